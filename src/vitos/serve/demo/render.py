"""The findings of the demo as text and HTML. What a model wrote is escaped: it is text, never markup."""

from __future__ import annotations

from html import escape

from vitos.core.record import spell_answer
from vitos.serve.demo.compare import Look, Looks

TITLES = {"dense": "Dense", "sparse": "Sparse", "random": "Random"}
_COLUMNS = (
    ("", "How the image was looked at"),
    ("Answer", ""),
    ("Tokens kept", "Visual tokens that the answer was given from"),
    ("Encode", "Seconds: vision encoder, and the language model on the image"),
    ("Localize", "Seconds: the pass that writes boxes"),
    ("Reason", "Seconds: leaving tokens out, and the pass that answers"),
    ("Total", "Seconds"),
    ("Read", "Tokens that the language model read"),
    ("Written", "Tokens that the language model wrote"),
)


def title(look: Look) -> str:
    """ "Sparse (gather): 6 of 64 tokens (9%)"."""
    return f"{_name(look)}: {look.kept}"


def heading(look: Look, question: str) -> str:
    """HTML above a picture: the way and its tokens, and the answer."""
    return f"<b>{escape(title(look))}</b><br>→ {escape(answer_text(look, question))}"


def answer_text(look: Look, question: str) -> str:
    """ "B. cyst", or "no answer could be read"."""
    answer = look.finding.answer
    return "no answer could be read" if answer is None else spell_answer(question, answer)


def results_table(looks: Looks, question: str) -> str:
    """One row for each way: answer, tokens kept, seconds by stage, tokens read and written."""
    head = "".join(
        f'<th scope="col" title="{escape(why)}">{escape(name)}</th>' if name else "<td></td>" for name, why in _COLUMNS
    )
    rows = []
    for look in looks:
        seconds = (look.encode_seconds, look.localize_seconds, look.reason_seconds, sum(look.seconds.values()))
        cells = [
            f'<td class="answer">{escape(answer_text(look, question))}</td>',
            f"<td>{escape(look.kept.replace(' tokens', ''))}</td>",
        ]
        cells += [f"<td>{value:.3f} s</td>" for value in seconds]
        cells += [f"<td>{look.tokens_read}</td>", f"<td>{look.tokens_written}</td>"]
        rows.append(f'<tr><th scope="row">{escape(_name(look))}</th>{"".join(cells)}</tr>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in looks.notes)
    caption = "<caption>Answers, tokens and seconds, each way from pixels to answer</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="results">{table}{notes}</div>'


def thoughts(looks: Looks, question: str) -> str:
    """What each way wrote before its answer."""
    items = []
    for look in looks:
        thought = look.finding.thought or look.finding.reasoning.response.text or "nothing was written"
        items.append(
            f"<dt>{escape(_name(look))}: {escape(answer_text(look, question))}</dt><dd>{escape(thought)}</dd>"
        )
    return f'<dl class="thoughts">{"".join(items)}</dl>'


def _name(look: Look) -> str:
    name = TITLES[look.name]
    return name if look.name == "dense" else f"{name} ({look.finding.plan})"
