"""Grades of answers: from the cache where they are known, from the judge where they are not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vitos.config.judge import JudgeSection, judge_problems
from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.engines.judge.cache import GradeCache, JudgeError, default_cache, grade_key

if TYPE_CHECKING:
    import httpx2

    from vitos.engines.judge.client import JudgeClient as Client

T = TypeVar("T")
LONGEST = 4000
"""Number of characters of an answer that the judge sees; a longer one is an attempt to talk to it."""
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_GRADE = re.compile(
    r"\W*(?:(?:final\s+)?(?:grade|verdict|score|answer)\s*[:=]\W*)?"
    r"(?P<grade>right|correct|yes|partly|partially\s+(?:right|correct)|wrong|incorrect|no|[01](?:\.\d{1,6})?)\W*",
    re.IGNORECASE,
)
_GRADES = {"right": 1.0, "correct": 1.0, "yes": 1.0, "wrong": 0.0, "incorrect": 0.0, "no": 0.0}


@dataclass(frozen=True, slots=True)
class Claim:
    """An answer to be graded: what was asked, what is right, and what was answered."""

    question: str
    golds: tuple[str, ...]
    answer: str

    @classmethod
    def about(cls, record: Record, answer: str) -> Claim:
        """The claim that `answer` answers a record's question."""
        question = record.question.replace(IMAGE_PLACEHOLDER, " ").strip()
        return cls(question, record.golds, answer)


class Judge:
    """Grades answers in words, in 0..1, by a model on a server.

    Grades are kept on disk by question, gold answers, answer, model, prompt and request options. Many answers are
    asked at once, equal ones once.

    Args:
        section: address, model, prompt and limits.
        transport: another transport than the network, for tests.

    Raises:
        JudgeError: if the settings contradict each other, or no model is named and the server lists none or several.
    """

    def __init__(self, section: JudgeSection, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        from vitos.engines.judge.client import JudgeCounts, only_model  # HTTP is for those who have a judge

        if found := list(judge_problems(section)):
            raise JudgeError("; ".join(f"judge.{name} {why}" for name, why in found))
        self.section = section
        self.model = section.model or only_model(section)
        self.cache = GradeCache(Path(section.cache).expanduser() if section.cache else default_cache())
        self.counts = JudgeCounts()
        self._transport = transport

    def __repr__(self) -> str:
        return f"Judge({self.model!r})"

    def grade(self, claims: Sequence[Claim]) -> list[float | None]:
        """The grade of each claim, 0..1; None for one that cannot be had, counted with its reason in `counts`.

        Raises:
            JudgeError: if no claim can be graded: a wrong address, model or key, or a damaged cache.
        """
        return wait_for(self.grades(claims))

    async def grades(self, claims: Sequence[Claim]) -> list[float | None]:
        """The same within a running event loop."""
        from vitos.engines.judge.client import JudgeClient

        keys = {claim: self._key(claim) for claim in dict.fromkeys(claims)}
        known = self.cache.get(list(keys.values()))
        self.counts.claims += len(keys)
        self.counts.known += sum(key in known for key in keys.values())
        asked = [claim for claim, key in keys.items() if key not in known]
        found: dict[Claim, float | None] = {claim: known.get(key) for claim, key in keys.items()}
        if asked:
            async with JudgeClient(self.section, self.counts, self._transport) as client:
                fresh = await asyncio.gather(*(self._ask(client, claim) for claim in asked))
                found |= dict(zip(asked, fresh, strict=True))
        return [found[claim] for claim in claims]

    def describe(self) -> dict[str, Any]:
        """What a report says about the judge: its model and prompt, and what could not be had. No address, no key."""
        counts = self.counts
        return {
            "model": self.model,
            "prompt": self.section.template,
            "claims": counts.claims,
            "known": counts.known,
            "requests": counts.requests,
            "tokens": counts.tokens,
            "unavailable": dict(counts.unavailable),
        }

    async def _ask(self, client: Client, claim: Claim) -> float | None:
        value = await client.reply(self.model, self._prompt(claim), read_grade)
        if value is not None:
            self.cache.put(self._key(claim), value)
        return value

    def _prompt(self, claim: Claim) -> str:
        gold: str | list[str] = claim.golds[0] if len(claim.golds) == 1 else list(claim.golds)
        quoted = {"question": claim.question, "gold": gold, "answer": claim.answer[:LONGEST]}
        return self.section.template.format(**{k: json.dumps(v, ensure_ascii=False) for k, v in quoted.items()})

    def _key(self, claim: Claim) -> str:
        asked = (claim.question, list(claim.golds), claim.answer)
        return grade_key(self.model, self.section.template, dict(self.section.options), *asked)


def read_grade(reply: str) -> float | None:
    """The grade in the last line of a reply, 0..1; None where that is anything but a grade.

    >>> read_grade("The side is the same.\\n**Partly**"), read_grade("0.25"), read_grade("not correct")
    (0.5, 0.25, None)
    """
    lines = [line for line in _THOUGHT.sub("", reply).splitlines() if any(map(str.isalnum, line))]
    match = _GRADE.fullmatch(lines[-1]) if lines and len(lines[-1]) < 100 else None
    if match is None:
        return None
    word = match["grade"].lower()
    if word.startswith("part"):
        return 0.5
    value = _GRADES[word] if word in _GRADES else float(word)
    return value if value <= 1 and not re.search(r"[-\d/]", lines[-1].replace(match["grade"], "")) else None


def wait_for(awaitable: Awaitable[T]) -> T:
    """Run an awaitable to its end, also where an event loop is running already, as in a notebook."""

    async def run() -> T:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(run())).result()
