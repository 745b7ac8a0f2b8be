"""ROUGE-1, ROUGE-2 and ROUGE-L by Google's rouge-score: F-measures 0..1 with stemming, means over the answers."""

from __future__ import annotations

from collections.abc import Sequence


def measure(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL`, of each answer's best reference."""
    from rouge_score import rouge_scorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(list(texts), answer) for answer, texts in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
