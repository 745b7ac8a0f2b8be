"""Token merging."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, mixed, selector


@selector(title="ToMe", rank=120)
def tome(task: Task, count: int) -> Choice:
    """ToMe (arXiv 2210.09461): rounds of bipartite soft matching on the visual tokens until `count` are left.

    The paper merges in the encoder, by the keys of each layer; here the embeddings behind a frozen encoder are merged.
    """
    return _merged(task, count, in_order=False)


@selector(title="ToMe, in order", rank=121, default=False)
def tome_in_order(task: Task, count: int) -> Choice:
    """ToMe with the tokens in the order of the image in every round, as PACT's version has them."""
    return _merged(task, count, in_order=True)


def _merged(task: Task, count: int, *, in_order: bool) -> Choice:
    def choose() -> Choice:
        places, matrix = bipartite_merge(task.visual.embeddings.float().cpu(), count, in_order=in_order)
        mask = mask_of(places, task.grid.num_tokens)
        return Choice(mask, visual=mixed(task.visual, mask, matrix[places.argsort()]), fusion=NO_FUSION)

    return task.once_per_scan(f"tome {in_order} {count}", choose)


def bipartite_merge(tokens: Tensor, count: int, *, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """Merge tokens (N, hidden) down to `count`.

    In one round, tokens alternate between the sets A and B, and each token of A finds the most similar one of B
    (cosine). The r most similar pairs are merged, weighted by the number of tokens that each side already holds. A
    round at most halves the tokens. As in the original without a class token, r is at most half of the tokens,
    rounded down, and the next round has the rest of A by falling similarity, then B.

    Args:
        in_order: r is rounded up, and the next round has the tokens in the order of the image.

    Returns:
        The places of the merged tokens (those of B), shape (count,), and their weights over all tokens, (count, N).
    """
    total = len(tokens)
    if not 1 <= count <= total:
        raise ValueError(f"count must be in 1..{total}, the number of visual tokens, got {count}")
    members = torch.eye(total)  # row: which tokens a group holds
    places = torch.arange(total)
    while (left := len(members)) > count:
        sizes = members.sum(-1, keepdim=True)
        unit = torch.nn.functional.normalize(members @ tokens / sizes, dim=-1)
        first, second = torch.arange(0, left, 2), torch.arange(1, left, 2)
        likeness, partner = (unit[first] @ unit[second].T).max(-1)
        falling = torch.sort(likeness, descending=True, stable=True).indices
        pairs = min(left - count, (left + 1) // 2 if in_order else left // 2)
        merged, rest = first[falling[:pairs]], first[falling[pairs:]]
        joined = members.index_add(0, second[partner[falling[:pairs]]], members[merged])
        stays = torch.cat([rest, second])
        stays = stays.sort().values if in_order else stays
        members, places = joined[stays], places[stays]
    return places, members / members.sum(-1, keepdim=True)
