"""Drives plans by hand: what a model with random weights writes as evidence is replaced by a given text."""

from dataclasses import replace

from vitos.core.stopwatch import Stopwatch
from vitos.policy.plans import Limits, get_plan
from vitos.policy.run import complete, finding, start
from vitos.policy.types import Query


def up_to(tokens, **limits):
    """Limits with the same number of tokens for each branch."""
    return Limits(max_tokens=tokens, max_evidence_tokens=tokens, **limits)


def told(vlm, scans, questions, text, limits, plan):
    """Findings of several questions whose localizations say `text`, a list of as many texts, or one for all."""
    method, watch = get_plan(plan), Stopwatch()
    queries = [Query.about(scan, question) for scan, question in zip(scans, questions, strict=True)]
    texts = [text] * len(queries) if isinstance(text, str) else text
    steps = start(method, vlm.branches, vlm.engine, queries, limits, watch)
    try:
        request = next(steps)
        while True:
            completions = complete(vlm.engine, request, watch)
            if request.branch == "localize":
                spoken = texts if len(completions) == len(texts) else texts[: len(completions)]
                completions = [replace(c, text=said) for c, said in zip(completions, spoken, strict=True)]
            request = steps.send(completions)
    except StopIteration as end:
        return [finding(method, query, outcome, watch) for query, outcome in zip(queries, end.value, strict=True)]
