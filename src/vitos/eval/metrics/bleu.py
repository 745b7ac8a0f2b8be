"""Corpus BLEU by sacrebleu, 0..100, with its default tokenizer "13a" and smoothing "exp"."""

from __future__ import annotations

from collections.abc import Sequence


def measure(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu`, over all answers together; answers may have different numbers of references."""
    import sacrebleu

    most = max(map(len, references))
    # sacrebleu takes one list of references per rank; where an answer has fewer, its first one is repeated.
    ranks = [[texts[min(rank, len(texts) - 1)] for texts in references] for rank in range(most)]
    return {"bleu": sacrebleu.corpus_bleu(list(answers), ranks).score}
