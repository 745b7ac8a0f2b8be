"""The demo's answers as text and HTML. What a model wrote is escaped: it is text, never markup."""

from __future__ import annotations

from html import escape

from vitos.core.record import spell_answer
from vitos.policy.types import tokens_read, tokens_written
from vitos.serve.demo.compare import ComparedAnswer, Comparison

_COLUMNS = (
    ("", "How the image was looked at"),
    ("Answer", ""),
    ("Tokens kept", "Visual tokens that the answer was given from"),
    ("Encode", "Seconds: vision encoder, and the language model on the image"),
    ("Localize", "Seconds: the pass that writes boxes, or the layers up to the evidence head"),
    ("Keep", "Seconds: leaving tokens out"),
    ("Reason", "Seconds: the pass that answers"),
    ("Total", "Seconds"),
    ("Read", "Tokens that the language model read"),
    ("Written", "Tokens that the language model wrote"),
)


def title(answer: ComparedAnswer) -> str:
    """One line for an answer, such as "Sparse (gather): 6 of 64 tokens (9%)"."""
    return f"{answer.title}: {answer.kept}"


def heading(answer: ComparedAnswer, question: str) -> str:
    """HTML above a picture: its tokens, and the answer."""
    return f"<b>{escape(title(answer))}</b><br>→ {escape(answer_text(answer, question))}"


def answer_text(answer: ComparedAnswer, question: str) -> str:
    """The answer, such as "B. cyst", or "no answer could be read"."""
    given = answer.finding.answer
    return "no answer could be read" if given is None else spell_answer(question, given)


def results_table(comparison: Comparison, question: str) -> str:
    """HTML with one row per answer: the answer, tokens kept, seconds by stage, tokens read and written."""
    head = "".join(
        f'<th scope="col" title="{escape(why)}">{escape(name)}</th>' if name else "<td></td>" for name, why in _COLUMNS
    )
    rows = []
    for answer in comparison:
        seconds, tokens = answer.seconds, answer.finding.tokens
        cells = [answer.kept.replace(" tokens", ""), *(f"{value:.3f} s" for value in (*seconds, sum(seconds)))]
        cells += [str(tokens_read(tokens)), str(tokens_written(tokens))]
        first = f'<td class="answer">{escape(answer_text(answer, question))}</td>'
        others = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(answer.title)}</th>{first}{others}</tr>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in comparison.notes)
    caption = "<caption>Answers, tokens and seconds, each way from pixels to answer</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="results">{table}{notes}</div>'


def thoughts(comparison: Comparison, question: str) -> str:
    """HTML of what was written before each answer."""
    items = []
    for answer in comparison:
        thought = answer.finding.thought or answer.finding.reasoning.response.text or "nothing was written"
        term = f"{answer.title}: {answer_text(answer, question)}"
        items.append(f"<dt>{escape(term)}</dt><dd>{escape(thought)}</dd>")
    return f'<dl class="thoughts">{"".join(items)}</dl>'
