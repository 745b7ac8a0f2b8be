"""How `vitos ask` shows an answer: as a table for a person, or as one line of JSON for a program."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from vitos.core.record import spell_answer
from vitos.policy.types import Finding
from vitos.serve import NOTICE


def answer_table(finding: Finding, question: str, image: str) -> Table:
    """The answer with its evidence and cost; what the model wrote, where no answer could be read.

    Args:
        question: the question with its options.
        image: what is known of the image, in words.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "image": image,
        "answer": _spelled(finding, question) or "no answer could be read",
        **({"written": finding.reasoning.response.text or "nothing"} if finding.answer is None else {}),
        "reasoning": finding.thought or "–",
        "evidence": ", ".join(str([round(v, 3) for v in b.as_tuple()]) for b in finding.boxes) or "–",
        "plan": finding.plan + (f" – {finding.fallback_reason}" if finding.fallback else ""),
        "tokens kept": f"{finding.kept.count} of {finding.grid.num_tokens} ({finding.kept_ratio:.0%})",
        "seconds": ", ".join(f"{name} {value:.3f}" for name, value in finding.seconds.items()),
        "tokens": ", ".join(f"{name} {value}" for name, value in finding.tokens.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # what a model wrote is text, never rich's markup
    return table


def answer_json(finding: Finding, question: str, image: str, warnings: tuple[str, ...] = ()) -> str:
    """One line of JSON. Boxes are x1, y1, x2, y2 in 0..1 of the image; `answer` is null if none could be read."""
    values = {
        "answer": finding.answer,
        "answer_text": _spelled(finding, question),
        "thought": finding.thought,
        "boxes": [box.as_tuple() for box in finding.boxes],
        "plan": finding.plan,
        "fallback": finding.fallback_reason if finding.fallback else None,
        "kept_tokens": finding.kept.count,
        "visual_tokens": finding.grid.num_tokens,
        "kept_ratio": finding.kept_ratio,
        "written": finding.reasoning.response.text,
        "seconds": dict(finding.seconds),
        "tokens": dict(finding.tokens),
        "image": image,
        "warnings": warnings,
        "notice": NOTICE,
    }
    return json.dumps(values, ensure_ascii=False)


def _spelled(finding: Finding, question: str) -> str | None:
    """`B. mass`; None: no answer could be read."""
    return None if finding.answer is None else spell_answer(question, finding.answer)
