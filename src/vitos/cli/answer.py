"""How `vitos ask` shows an answer: as a table for a person, or as one line of JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from vitos.core.record import spell_answer
from vitos.policy.types import Finding
from vitos.serve import NOTICE


def answer_table(finding: Finding, question: str, images: str, evidence: str) -> Table:
    """The answer with its evidence and cost; what the model wrote, where no answer could be read.

    Args:
        question: the question with its options.
        images: what is known of the images, in words.
        evidence: the boxes, in words; may be empty.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "images": images,
        "answer": _spelled(finding, question) or "no answer could be read",
        **({"written": finding.reasoning.response.text or "nothing"} if finding.answer is None else {}),
        "reasoning": finding.thought or "–",
        "evidence": evidence or "–",
        "plan": finding.plan + (f" – {finding.fallback_reason}" if finding.fallback else ""),
        "tokens kept": f"{finding.kept.count} of {finding.grid.num_tokens} ({finding.kept_ratio:.0%})",
        "seconds": ", ".join(f"{name} {value:.3f}" for name, value in finding.seconds.items()),
        "tokens": ", ".join(f"{name} {value}" for name, value in finding.tokens.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # what a model wrote is text, never rich's markup
    return table


def answer_json(
    finding: Finding, question: str, images: str, numbers: Sequence[int] = (1,), warnings: Sequence[str] = ()
) -> str:
    """One line of JSON; `answer` is null if none could be read.

    A box is x1, y1, x2, y2 in 0..1 of its image, and `image` the number of that image or slice in the prompt.

    Args:
        numbers: the number of each image in the prompt.
    """
    values = {
        "answer": finding.answer,
        "answer_text": _spelled(finding, question),
        "thought": finding.thought,
        "boxes": [{"image": numbers[box.image - 1], "box": box.as_tuple()} for box in finding.boxes],
        "plan": finding.plan,
        "fallback": finding.fallback_reason if finding.fallback else None,
        "kept_tokens": finding.kept.count,
        "visual_tokens": finding.grid.num_tokens,
        "kept_ratio": finding.kept_ratio,
        "written": finding.reasoning.response.text,
        "seconds": dict(finding.seconds),
        "tokens": dict(finding.tokens),
        "images": images,
        "warnings": list(warnings),
        "notice": NOTICE,
    }
    return json.dumps(values, ensure_ascii=False)


def _spelled(finding: Finding, question: str) -> str | None:
    """`B. mass`; None: no answer could be read."""
    return None if finding.answer is None else spell_answer(question, finding.answer)
