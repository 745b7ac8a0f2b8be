"""Figures of an update, for the log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitos.rl.rollout import QuestionGroup


def rollout_metrics(groups: Sequence[QuestionGroup]) -> dict[str, float]:
    """Figures of one update's questions; docs/results.md describes all of them.

    `fallback_rate`, `parse_rate` and `whole_image_rate` are shares of the localizations, the last one of those with a
    box over more than 0.9 of the image. `group_std` is the mean standard deviation of a question's rewards,
    `zero_std_rate` the share of questions whose rewards are all equal.
    """
    localizations = [r for g in groups for r in g.localizations]
    reasonings = [r for g in groups for row in g.reasonings for r in row]
    kept = [k for g in groups for k in g.kept]
    boxes = [len(r.response.boxes) for r in localizations]
    whole = [any(b.area > 0.9 for b in r.response.boxes) for r in localizations]
    spread = np.array([[g.rewards.localization.std(), g.rewards.reasoning.std()] for g in groups])
    metrics = {
        "reward/localization": float(np.mean([g.rewards.localization.mean() for g in groups])),
        "reward/reasoning": float(np.mean([g.rewards.reasoning.mean() for g in groups])),
        "accuracy/localization": _mean(stack(groups, "accuracy")),
        "accuracy/sparse": _mean(stack(groups, "sparse_accuracy")),
        "kept_ratio": float(np.mean([k.ratio for k in kept])),
        "fallback_rate": float(np.mean([k.fallback for k in kept])),
        "parse_rate": float(np.mean([r.response.evidence_parsed for r in localizations])),
        "no_answer_rate": float(np.mean([r.response.answer is None for r in reasonings])),
        "boxes_per_response": float(np.mean(boxes)),
        "whole_image_rate": float(np.mean(whole)),
        "truncated_rate": float(np.mean([not r.completion.finished for r in [*localizations, *reasonings]])),
        "group_std/localization": float(spread[:, 0].mean()),
        "group_std/reasoning": float(spread[:, 1].mean()),
        "zero_std_rate": float((spread.max(1) < 1e-9).mean()),
        "tokens/localization": float(np.mean([len(r.completion.token_ids) for r in localizations])),
        "tokens/reasoning": float(np.mean([len(r.completion.token_ids) for r in reasonings])),
    }
    for term in groups[0].rewards.terms:
        if term not in ("accuracy", "sparse_accuracy"):
            values = stack(groups, term)
            if not np.isnan(values).all():
                metrics[f"reward/{term}"] = float(np.nanmean(values))
    metrics["iou"] = metrics.get("reward/iou", float("nan"))
    return metrics | _judge_metrics(groups)


def _judge_metrics(groups: Sequence[QuestionGroup]) -> dict[str, float]:
    """Figures of the questions that a judge grades; none if there are none.

    `judge/one_grade_rate` is the share of the graded groups in which all answers of both branches have one grade: such
    a group teaches nothing.
    """
    graded = [group.rewards for group in groups if group.rewards.graded is not None]
    if not graded:
        return {}
    asked, missing = sum(r.graded or 0 for r in graded), sum(r.ungraded for r in graded)
    whole = [r.terms for r in graded if r.ungraded == 0]
    spread = [np.ptp(np.concatenate([t["accuracy"], t["sparse_accuracy"].ravel()])) for t in whole]
    return {
        "judge/answers": float(asked),
        "judge/unavailable_rate": missing / max(1, asked),
        "judge/abstained_groups": float(len(graded) - len(whole)),
        "judge/one_grade_rate": float(np.mean([value < 1e-9 for value in spread])) if spread else float("nan"),
    }


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what did not abstain; NaN if all did."""
    known = values[~np.isnan(values)]
    return float((values if known.size == values.size else known).mean()) if known.size else float("nan")


def stack(groups: Sequence[QuestionGroup], term: str) -> NDArray[np.float64]:
    """A reward term of P groups, shape (P, G) or (P, G, K)."""
    return np.stack([group.rewards.terms[term] for group in groups])
