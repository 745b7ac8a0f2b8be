"""A finding → OpenAI's format: the finished response, and the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vitos.core.record import spell_answer
from vitos.policy.run import Piece
from vitos.policy.types import Finding, tokens_read, tokens_written
from vitos.serve.api import schema
from vitos.serve.api.scheduler import Job

_OPEN, _CLOSE = "<think>", "</think>"


class Thought:
    """The thought of the reasoning branch while it is written, without its tags."""

    def __init__(self) -> None:
        self._text = ""
        self._shown = 0

    def next(self, piece: Piece) -> str:
        """What a piece adds to the thought; text that may be the start of the closing tag is held back."""
        if piece.branch != "reason":
            return ""
        self._text += piece.text
        _, opened, inside = self._text.partition(_OPEN)
        if not opened:
            return ""
        thought, closed, _ = inside.partition(_CLOSE)
        if not closed:
            while any(thought.endswith(_CLOSE[:n]) for n in range(1, len(_CLOSE))):
                thought = thought[:-1]
        new, self._shown = thought[self._shown :], max(self._shown, len(thought))
        return new


def completion(header: Mapping[str, Any], job: Job, finding: Finding) -> schema.ChatResponse:
    """The response to an answered question."""
    written, read = tokens_written(finding.tokens), tokens_read(finding.tokens) + job.prefix_tokens
    content = spell_answer(job.text, finding.answer) if finding.answer else ""
    ended = finding.reasoning.completion.finished
    return schema.ChatResponse(
        **header,
        choices=[
            schema.ChatChoice(
                message=schema.ChatAnswer(content=content, reasoning_content=finding.thought),
                finish_reason="stop" if ended else "length",
            )
        ],
        usage=schema.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written),
        vitos=schema.Evidence(
            answer=finding.answer,
            thought=finding.thought,
            text=finding.reasoning.completion.text,
            boxes=[
                box.as_tuple() if box.image == 1 else schema.FoundInImage(image=box.image, box=box.as_tuple())
                for box in finding.boxes
            ],
            kept_tokens=finding.kept.count,
            kept_per_image=[one.count for one in finding.kept.images],
            visual_tokens=finding.grid.num_tokens,
            kept_ratio=finding.kept_ratio,
            plan=finding.plan,
            fallback=finding.fallback,
            fallback_reason=finding.fallback_reason,
            images=[image.facts.summary() for image in job.images],
            warnings=[warning for image in job.images for warning in image.facts.warnings],
            seconds={stage: round(value, 6) for stage, value in finding.seconds.items()},
            tokens=finding.tokens,
        ),
    )


def chunk(
    header: Mapping[str, Any],
    delta: Mapping[str, Any] | None,
    finish_reason: str | None = None,
    usage: Mapping[str, Any] | None = None,
    vitos: Mapping[str, Any] | None = None,
) -> bytes:
    """One server-sent event of a stream; without a delta it has no choice, like OpenAI's last one with the usage."""
    choices = [] if delta is None else [{"index": 0, "delta": dict(delta), "finish_reason": finish_reason}]
    event = {**header, "object": "chat.completion.chunk", "choices": choices}
    event |= {key: value for key, value in (("usage", usage), ("vitos", vitos)) if value is not None}
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
