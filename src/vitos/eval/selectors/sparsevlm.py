"""SparseVLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitos.core.geometry import BoolArray
from vitos.eval.selectors.attention import FASTV_LAYER, language_attention, of_image
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, mask_of, mixed, selector

RECYCLED_SHARE = 0.3
TOKENS_PER_CLUSTER = 10


@selector(title="SparseVLM", rank=72)
def sparsevlm(task: Task, count: int) -> Choice:
    """SparseVLM 1.0 (arXiv 2410.04417): tokens that the fitting words attend to; the best of the rest merged.

    The authors' code prunes in flight behind layers 2, 6 and 15 and leaves a count of its own in each; here it is one
    step, before the first layer, by the attention in layer 2 of the dense prompt.
    """

    def attention() -> Tensor:
        behind = torch.arange(task.prompt.prefix_length, len(task.prompt))
        embeddings = task.policy.backbone.model.get_input_embeddings()
        with torch.no_grad():
            words = embeddings(task.prompt.input_ids[behind].to(embeddings.weight.device)).double().cpu()
        return of_image(
            task, language_attention(task, FASTV_LAYER, behind[raters(task.tokens, words)].tolist()).received
        )

    seen, total = task.once("sparsevlm", attention), task.grid.num_tokens
    kept = [n for n in range(1, total) if n + num_clusters(total - n)[1] == count]
    if not kept:  # all tokens, or fewer than the clusters would be
        return Choice(highest(seen, count), fusion=NO_FUSION)
    mask, matrix = recycled_merge(task.tokens, seen, max(kept))
    return Choice(mask, visual=mixed(task.visual, mask, matrix), fusion=NO_FUSION)


def raters(tokens: Tensor, words: Tensor) -> Tensor:
    """Words (M, hidden) whose mean softmaxed product with the visual tokens (N, hidden) is above average; indices."""
    relevance = (tokens @ words.T).softmax(dim=-1).mean(0)  # (M,)
    return (relevance > relevance.mean()).nonzero()[:, 0]


def recycled_merge(tokens: Tensor, attention: Tensor, kept: int) -> tuple[BoolArray, Tensor]:
    """Kept tokens and clusters, bool (N,), and the weights (n, N) that mix all tokens into them.

    The `kept` most attended tokens, fewer than N, stay as they are. Of the others, the upper 30 % are recycled: merged
    into a tenth as many clusters, each at the place of its centre.
    """
    total = len(tokens)
    order = torch.sort(attention, descending=True, stable=True).indices
    recycled, clusters = num_clusters(total - kept)
    pool = order[kept : kept + recycled]
    centres, owner = density_peaks(tokens[pool], clusters)
    matrix = torch.eye(total)
    for cluster, centre in enumerate(pool[centres]):
        members = pool[owner == cluster]
        matrix[centre] = torch.zeros(total).index_fill(0, members, 1 / len(members))
    mask = mask_of(torch.cat([order[:kept], pool[centres]]), total)
    return mask, matrix[torch.from_numpy(mask)]


def num_clusters(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters, as the authors count."""
    recycled = min(int(RECYCLED_SHARE * dropped) + 1, dropped)
    return recycled, int(recycled / TOKENS_PER_CLUSTER) + 1


def density_peaks(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster centres (count,), and the cluster of each point (n,), by density peaks over the nearest `count` points.

    The authors add random noise of 1e-6 to the densities, to break ties; here the first of equal points wins.
    """
    distance = torch.cdist(points, points) / points.shape[1] ** 0.5
    nearest = distance.sort(dim=-1).values[:, :count]
    density = (-(nearest**2).mean(-1)).exp()
    denser = density[None] > density[:, None]
    gap = torch.where(denser, distance, distance.max()).min(-1).values
    centres = torch.sort(gap * density, descending=True, stable=True).indices[:count]
    owner = distance[centres].argmin(0)
    owner[centres] = torch.from_numpy(np.arange(count))
    return centres, owner
