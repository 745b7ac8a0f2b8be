"""Token merging."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.core.geometry import BoolArray
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, mixed, selector


@selector(title="ToMe", rank=120)
def tome(task: Task, count: int) -> Choice:
    """ToMe (arXiv 2210.09461): rounds of bipartite soft matching on the visual tokens until `count` are left.

    The paper merges in the encoder, by the keys of each layer; here the embeddings behind a frozen encoder are merged.
    """

    def choose() -> Choice:
        mask, matrix = bipartite_merge(task.visual.embeddings.float().cpu(), count)
        return Choice(mask, visual=mixed(task.visual, mask, matrix), fusion=NO_FUSION)

    return task.once_per_scan(f"tome {count}", choose)


def bipartite_merge(tokens: Tensor, count: int) -> tuple[BoolArray, Tensor]:
    """Merge tokens (N, hidden) down to `count`.

    In one round, tokens alternate between the sets A and B, and each token of A finds the most similar one of B
    (cosine). The r most similar pairs are merged, weighted by the number of tokens that each side already holds. r is
    at most |A|, so a round at most halves the tokens.

    Returns:
        The places of the merged tokens (those of B), bool (N,), and their weights over all tokens, shape (count, N).
    """
    total = len(tokens)
    if not 1 <= count <= total:
        raise ValueError(f"count must be in 1..{total}, the number of visual tokens, got {count}")
    members = torch.eye(total)  # row: which tokens a group holds
    places = torch.arange(total)
    while len(members) > count:
        sizes = members.sum(-1, keepdim=True)
        unit = torch.nn.functional.normalize(members @ tokens / sizes, dim=-1)
        first, second = torch.arange(0, len(members), 2), torch.arange(1, len(members), 2)
        likeness, partner = (unit[first] @ unit[second].T).max(-1)
        merged = torch.sort(likeness, descending=True, stable=True).indices[: len(members) - count]
        joined = members.clone()
        joined.index_add_(0, second[partner[merged]], members[first[merged]])
        stays = torch.ones(len(members), dtype=torch.bool)
        stays[first[merged]] = False
        members, places = joined[stays], places[stays]
    return mask_of(places, total), members / members.sum(-1, keepdim=True)
