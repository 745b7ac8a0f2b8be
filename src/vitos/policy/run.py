"""Run a plan: for several questions together, or for one token by token.

    plan.steps ─► Request ─► engine ─► completions ─► plan.steps ─► … ─► Outcome ─► Finding

A server drives the same generators itself and merges the requests of several (`vitos.serve.api.scheduler`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion, count_run
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Limits, Outcome, Plan, Request, Steps
from vitos.policy.types import Finding, Query


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a branch's text.

    Attributes:
        branch: "localize" or "reason".
        text: the characters since the last piece.
    """

    branch: str
    text: str


def start(
    plan: Plan, branches: Branches, engine: TorchEngine, queries: Sequence[Query], limits: Limits, watch: Stopwatch
) -> Steps:
    """The steps of a plan; the caller completes their requests.

    Raises:
        ValueError: if the family cannot follow the plan, or a question has boxes or a budget that the plan cannot use.
    """
    for problem in (plan.refusal(branches.backbone), *map(plan.question_problem, queries)):
        if problem:
            raise ValueError(problem)
    return plan.steps(branches, plan.prepare(branches, engine, queries, watch), limits, watch)


def answer(
    plan: Plan, branches: Branches, engine: TorchEngine, queries: Sequence[Query], limits: Limits, watch: Stopwatch
) -> list[Outcome]:
    """Follow a plan for several questions together; errors as in `start`."""
    steps = start(plan, branches, engine, queries, limits, watch)
    try:
        request = next(steps)
        while True:
            request = steps.send(complete(engine, request, watch))
    except StopIteration as end:
        outcomes: list[Outcome] = end.value
        return outcomes


def stream(
    plan: Plan, branches: Branches, engine: TorchEngine, query: Query, limits: Limits, watch: Stopwatch
) -> Generator[Piece, None, Outcome]:
    """The same as `answer` for one question, with its text piece by piece."""
    steps = start(plan, branches, engine, [query], limits, watch)
    try:
        request = next(steps)
        while True:
            completion = yield from _pieces(engine, request, watch)
            request = steps.send([completion])
    except StopIteration as end:
        outcome: Outcome = end.value[0]
        return outcome


def finding(plan: Plan, query: Query, outcome: Outcome, watch: Stopwatch) -> Finding:
    """The outcome of a question as a finding."""
    response = outcome.reasoning.response
    return Finding(
        answer=response.answer,
        thought=response.thought,
        boxes=outcome.boxes,
        kept=outcome.kept,
        localization=outcome.localization,
        reasoning=outcome.reasoning,
        seconds=watch.seconds,
        tokens=watch.tokens,
        images=query.scan.images,
        plan=plan.name,
    )


def complete(engine: TorchEngine, request: Request, watch: Stopwatch) -> list[Completion]:
    """One greedy completion per prompt of a request."""
    prompts, prefixes, branch = request.prompts, request.prefixes, request.branch
    seeds = [[0]] * len(prompts)
    rows = engine.sample(prompts, request.sampling, seeds, watch.spans(branch), prefixes)
    count_run(watch, branch, prompts, prefixes, rows)
    return [row[0] for row in rows]


def _pieces(engine: TorchEngine, request: Request, watch: Stopwatch) -> Generator[Piece, None, Completion]:
    (prompt,), (prefix,), branch = request.prompts, request.prefixes, request.branch
    text = engine.stream(prompt, request.sampling, watch.spans(branch), prefix=prefix)
    while True:
        try:
            piece = next(text)
        except StopIteration as end:
            completion: Completion = end.value
            count_run(watch, branch, request.prompts, request.prefixes, [[completion]])
            return completion
        yield Piece(branch, piece)
