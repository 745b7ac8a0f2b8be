"""The ways to answer a question, by one word each: how the image is looked at, localized on, thinned and reasoned on.

    two_pass   localize on all visual tokens; prefill a prompt of the kept ones anew (the paper)
    gather     localize on all; keep the kept tokens' keys and values, drop the others', go on behind them
    coarse     localize on the image at half its width and height; encode the evidence alone at full resolution
    dense      no localization: reason on all visual tokens (reference)
    crop       localize on all; cut the evidence out and encode it as an image of its own (reference)

A plan is a generator of what it wants sampled: it yields a `Request`, is sent the completions, and returns an
`Outcome` for every question. So the same few lines answer one question or many, at once (`answer`) or token by token
(`stream`), and a server may merge the requests of several plans.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion
from vitos.engines.prefix import count_run
from vitos.policy.plans.base import Limits, Look, Outcome, Piece, Plan, Request, Steps
from vitos.policy.plans.coarse import Coarse, Crop
from vitos.policy.plans.two_pass import Dense, Gather, TwoPass
from vitos.policy.types import Query

if TYPE_CHECKING:
    from vitos.policy.vlm import SparseVLM

__all__ = [
    "AGAIN",
    "PLANS",
    "Limits",
    "Look",
    "Outcome",
    "Piece",
    "Plan",
    "Request",
    "Steps",
    "answer",
    "start",
    "stream",
]

PLANS: dict[str, Plan] = {plan.name: plan for plan in (TwoPass(), Gather(), Coarse(), Dense(), Crop())}
AGAIN = ("coarse", "crop")
"""Plans that look at the image again, so that their scans hold it."""


# --- running a plan -------------------------------------------------------------------------------------------------


def answer(vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> list[Outcome]:
    """Follow the plan of the policy's spec for several questions together.

    Raises:
        ValueError: if the family cannot, or a scan was made for another plan.
    """
    steps = start(vlm, queries, limits, watch)
    try:
        request = next(steps)
        while True:
            request = steps.send(vlm.complete(request, watch))
    except StopIteration as end:
        outcomes: list[Outcome] = end.value
        return outcomes


def stream(vlm: SparseVLM, query: Query, limits: Limits, watch: Stopwatch) -> Generator[Piece, None, Outcome]:
    """The same for one question, its text piece by piece."""
    steps = start(vlm, [query], limits, watch)
    try:
        request = next(steps)
        while True:
            completions = []
            if request.prompts:
                completions = [(yield from _pieces(vlm, request, watch))]
            request = steps.send(completions)
    except StopIteration as end:
        outcome: Outcome = end.value[0]
        return outcome


def start(vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
    """The steps of the policy's plan, for whoever completes their requests; errors as in `answer`."""
    plan = PLANS[vlm.spec.plan]
    if refusal := plan.refusal(vlm.backbone):
        raise ValueError(refusal)
    if any(query.scan.reduced != plan.reduced for query in queries):
        raise ValueError(f'a scan was made for another plan than {plan.name}; use encode(…, plan="{plan.name}")')
    return plan.steps(vlm, queries, limits, watch)


def _pieces(vlm: SparseVLM, request: Request, watch: Stopwatch) -> Generator[Piece, None, Completion]:
    (prompt,), (prefix,) = request.prompts, request.prefixes
    text = vlm.engine.stream(
        prompt, request.sampling, lambda move: watch.stage(f"{request.branch}_{move}"), prefix=prefix
    )
    while True:
        try:
            piece = next(text)
        except StopIteration as end:
            completion: Completion = end.value
            count_run(watch, request.branch, request.prompts, request.prefixes, [[completion]])
            return completion
        yield Piece(request.branch, piece)
