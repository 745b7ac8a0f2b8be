"""A user's rewards: one function each, plain or `async`, of one response or of all responses to a question at once.

def short(response, record): ...                 # a number, or None to abstain
async def asked(response, record): ...           # the same; those of all questions of an update run together
def distinct(responses, record): ...             # per: group; one number or None per response, in their order
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitos.core.record import Record
from vitos.core.response import Response
from vitos.engines.judge.judge import wait_for

FloatArray = NDArray[np.float64]
RewardFunction = Callable[[Any, Record], Any]
"""(response, record) → a number or None; for `per: group`, (responses, record) → one of them per response. It may be
`async`."""
Branch = Literal["localization", "reasoning", "both"]
Per = Literal["response", "group"]


class RewardError(ValueError):
    """A user's reward could not be loaded, failed, or returned something that is not a finite number or None."""


@dataclass(frozen=True, slots=True)
class ExtraReward:
    """A user's reward: `weight` × `function(response, record)`, added to the rewards of `branch`.

    >>> def length(response, record):
    ...     return len(response.text) / 1000
    >>> penalty = ExtraReward("length", length, weight=-0.1, branch="reasoning")

    Attributes:
        name: name of the reward in the log.
        function: the reward of a response to a record; None abstains, and the term is left out of that sum. It may be
            `async`: then all responses of an update are awaited together.
        weight: weight of the reward; negative for a penalty.
        branch: the branch that gets the reward, "localization", "reasoning" or "both".
        per: "response", or "group" for a function of all responses of a branch to one question: G localizations, or
            G·K reasonings, those of the first localization first.

    Raises:
        ValueError: if the weight is not finite.
    """

    name: str
    function: RewardFunction
    _: KW_ONLY
    weight: float
    branch: Branch
    per: Per = "response"

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of reward {self.name!r} must be finite, got {self.weight}")


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question with all its texts.

    Attributes:
        localizations: responses O_i, length G.
        reasonings: responses O'_ij, G rows of length K.

    Raises:
        ValueError: if the rollouts are not G and G×K with G, K >= 1.
    """

    record: Record
    localizations: Sequence[Response]
    reasonings: Sequence[Sequence[Response]]

    def __post_init__(self) -> None:
        columns = {len(row) for row in self.reasonings}
        g = len(self.localizations)
        if g == 0 or g != len(self.reasonings) or len(columns) != 1 or 0 in columns:
            raise ValueError(
                f"record {self.record.id!r}: expected G localization rollouts and G rows of K >= 1 reasoning rollouts,"
                f" got {g} and rows of {[len(row) for row in self.reasonings]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(G, K)."""
        return len(self.localizations), len(self.reasonings[0])

    @property
    def flat_reasonings(self) -> list[Response]:
        """All reasonings, row by row, length G·K."""
        return [response for row in self.reasonings for response in row]


def extra_terms(questions: Sequence[AnsweredQuestion], extra: Sequence[ExtraReward]) -> list[dict[str, FloatArray]]:
    """The values of all extra rewards before weighting, by term; NaN abstains.

    Those of localization have the shape (G,), those of reasoning have `sparse_` in front of the name and shape (G, K).

    Raises:
        RewardError: if a reward fails; it names the reward and the record.
        ValueError: if two rewards have one name.
    """
    calls = []  # (question, term, shape, reward, values that may have to be awaited)
    for number, question in enumerate(questions):
        for reward in extra:
            for term, shape, responses in _parts(reward, question):
                calls.append((number, term, shape, reward, _call(reward, question.record, responses)))
    found: list[dict[str, FloatArray]] = [{} for _ in questions]
    for (number, term, shape, reward, _), values in zip(calls, _resolved([call[-1] for call in calls]), strict=True):
        if term in found[number]:
            raise ValueError(f"two rewards are called {term!r}; give the extra reward another name")
        found[number][term] = _array(values, shape, _where(reward, questions[number].record))
    return found


def _parts(reward: ExtraReward, question: AnsweredQuestion) -> list[tuple[str, tuple[int, ...], Sequence[Response]]]:
    parts: list[tuple[str, tuple[int, ...], Sequence[Response]]] = []
    if reward.branch in ("localization", "both"):
        parts.append((reward.name, question.shape[:1], question.localizations))
    if reward.branch in ("reasoning", "both"):
        parts.append((f"sparse_{reward.name}", question.shape, question.flat_reasonings))
    return parts


def _call(reward: ExtraReward, record: Record, responses: Sequence[Response]) -> Any:
    """The values of some responses: a sequence of them, an awaitable of one, or a sequence with awaitables in it."""
    try:
        if reward.per == "group":
            values = reward.function(list(responses), record)
        else:
            values = [reward.function(response, record) for response in responses]
    except Exception as exc:
        raise RewardError(f"{_where(reward, record)}: {type(exc).__name__}: {exc}") from exc
    return _Named(values, _where(reward, record))


@dataclass(frozen=True, slots=True)
class _Named:
    values: Any
    where: str

    @property
    def waits(self) -> bool:
        return inspect.isawaitable(self.values) or (
            isinstance(self.values, list) and any(map(inspect.isawaitable, self.values))
        )

    async def awaited(self) -> Any:
        try:
            if inspect.isawaitable(self.values):
                return await self.values
            return await asyncio.gather(
                *(value if inspect.isawaitable(value) else _now(value) for value in self.values)
            )
        except Exception as exc:
            raise RewardError(f"{self.where}: {type(exc).__name__}: {exc}") from exc


async def _now(value: Any) -> Any:
    return value


def _resolved(calls: Sequence[_Named]) -> list[Any]:
    """The values of all calls; what has to be awaited is awaited together."""
    waiting = [call for call in calls if call.waits]
    if not waiting:
        return [call.values for call in calls]

    async def together() -> list[Any]:
        return await asyncio.gather(*(call.awaited() for call in waiting))

    results = iter(wait_for(together()))
    return [next(results) if call.waits else call.values for call in calls]


def _array(values: Any, shape: tuple[int, ...], where: str) -> FloatArray:
    """The values as float64, None as NaN."""
    if (
        isinstance(values, str | bytes)
        or not isinstance(values, Sequence | np.ndarray)
        or len(values) != math.prod(shape)
    ):
        got = f"{len(values)} values" if isinstance(values, Sequence | np.ndarray) else type(values).__name__
        raise RewardError(f"{where}: expected a list of {math.prod(shape)} values, one per response, got {got}")
    numbers = [math.nan if value is None else _finite(value, where) for value in values]
    return np.array(numbers, dtype=np.float64).reshape(shape)


def _finite(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an integer beyond the range of float
        number = math.inf
    if not math.isfinite(number):
        shown = number if isinstance(value, Real) else type(value).__name__
        raise RewardError(f"{where}: expected a finite number or None, got {shown}")
    return number


def _where(reward: ExtraReward, record: Record) -> str:
    return f"reward {reward.name!r}, record {record.id!r}"
