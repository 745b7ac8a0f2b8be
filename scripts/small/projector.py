"""How projector and new tokens start: visual tokens say where they are and what they see, in words the model knows.

A fresh projector in front of a language model learns slowly (each question tells it a few words, at the price of the
whole model), and adapters that are trained meanwhile learn to do without the image. So the projector is trained first
without the language model, on what is known of each cell of the scenes:

- The kinds of findings there, read out along the embeddings of their names: " platelet", " gli" + "oma".
- Its place, as waves (`nano_real.projector.place_code`) along fixed directions. The rows of the number tokens (0.00
  to 1.00) start with the same waves along the same directions, so that a coordinate in the text resembles the tokens
  there.
- The box of its finding, through a linear head that is thrown away.

The same losses go on, with a small weight, while the language model is trained: the place hardly weighs in any other
loss before it is used, and is lost otherwise (docs/nano-real.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nano_real.projector import CYCLES, GRID, PLACE, covered, place_code, standardize
from nano_real.questions import area
from nano_real.scenes import CELLS, KINDS, NUCLEUS, Scene
from nano_real.start import number_waves
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from small.pictures import DISC, LESIONS
from small.rows import SHAPES, kinds_of
from vitos.nano.small import IMAGE_TOKEN, NUMBERS, TAGS

ALL_KINDS = (*KINDS, DISC, *LESIONS, *SHAPES)
PLACE_NORM, CONTENT_RMS = 1.6, 0.12  # beside embeddings of norm 3.3 and root mean square 0.136, before `GAIN`
# The first layers add states of norm 60 to whatever comes in. A visual token as large as an embedding is 5 % of what
# the second layer sees, and its place cannot be told from noise; sixteen times as large it stays most of it. Numbers
# are also what the model writes, by the same rows: their waves grow less, or logits do.
GAIN, WAVE_GAIN = 16.0, 5.0
FINE_CYCLES = (8.0, 16.0, 32.0)  # waves that tell neighbouring numbers apart
START_TAGS = ("thinking", "end of thinking", "evidence", "end of evidence", "answer", "end of answer")


@dataclass(frozen=True)
class Targets:
    """What each cell of a picture sees.

    Attributes:
        kinds: (256, kinds), 1 or 0, NaN where it is not known.
        boxes: (256, 4), hundredths, of the finding that covers most of the cell; -1 for none.
    """

    kinds: NDArray[np.float32]
    boxes: NDArray[np.int64]


def cell_of(x: float, y: float) -> int:
    """The token that sees a point."""
    column, row = (min(max(int(16 * v), 0), 15) for v in (x, y))
    return 16 * row + column


def targets_of(scene: Scene) -> Targets:
    kinds = np.full((256, len(ALL_KINDS)), np.nan, dtype=np.float32)
    boxes = np.full((256, 4), -1, dtype=np.int64)
    possible = kinds_of(scene)
    for index, kind in enumerate(ALL_KINDS):
        if kind in scene.complete or kind not in possible:
            kinds[:, index] = 0
    for fact in scene.facts:
        if fact.template == "platelet_in_window" and fact.truth == "no":
            kinds[covered(fact.place) > 0.5, ALL_KINDS.index(CELLS[2])] = 0
        if fact.template == "point_on_nucleus":
            kinds[cell_of(*fact.place[:2]), ALL_KINDS.index(NUCLEUS)] = float(fact.truth == "yes")
    most = np.full(256, 0.2)
    for kind, box in sorted(scene.findings, key=lambda f: -area(f[1])):  # small ones last: theirs are their best cells
        share = covered(box)
        best = share > np.minimum(most, 0.8 * share.max())
        kinds[best] = np.arange(len(ALL_KINDS)) == ALL_KINDS.index(kind)
        boxes[best] = [round(100 * min(max(v, 0), 1)) for v in box]
        most = np.where(best, share, most)
    return Targets(kinds, boxes)


class CellTask(nn.Module):
    """The losses that the projector learns from without the language model."""

    def __init__(self, embeddings: Tensor, name_ids: Sequence[Sequence[int]], seed: int = 0) -> None:
        """
        Args:
            embeddings: (V, hidden), of the language model's own tokens.
            name_ids: for each of `ALL_KINDS` the tokens of its name.
        """
        super().__init__()
        width = embeddings.shape[1]
        generator = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(width, PLACE + 2 * len(FINE_CYCLES), generator=generator)).Q
        names = torch.stack([embeddings[list(ids)].mean(0) for ids in name_ids]) - embeddings.mean(0)
        names = names - names @ directions @ directions.T
        self.register_buffer("directions", directions)  # of a place's waves, then of a number's fine ones
        self.register_buffer("names", F.normalize(names, dim=-1).T.contiguous())  # (hidden, kinds)
        self.register_buffer("place", place_code(torch.from_numpy(GRID.centres()).float()))  # (256, PLACE)
        self.scale = nn.Parameter(torch.full((len(ALL_KINDS),), 3.0))
        self.bias = nn.Parameter(torch.full((len(ALL_KINDS),), -3.0))
        self.box = nn.Linear(width, 8 * len(CYCLES))
        self.register_buffer("gain", torch.ones(()))  # of the projector's output

    def forward(self, tokens: Tensor, kinds: Tensor, boxes: Tensor) -> tuple[Tensor, float, float]:
        """The loss of projected tokens (n, 256, hidden), the share of findings named right, and of places."""
        tokens = tokens / self.gain
        at = tokens @ self.directions[:, :PLACE] * (PLACE / 2) ** 0.5 / PLACE_NORM
        place = F.mse_loss(at, self.place.expand_as(at))
        logits = self.scale * (tokens @ self.names) + self.bias  # (n, 256, kinds)
        sure, found = ~kinds.isnan(), boxes[..., 0] >= 0
        named = F.binary_cross_entropy_with_logits(logits[sure], kinds[sure]) if sure.any() else logits.sum() * 0
        loss, right = 4 * named + place, float("nan")
        if found.any():
            codes = F.normalize(number_waves(CYCLES, 101), dim=-1)
            own = 8 * self.box(tokens[found]).view(-1, codes.shape[1]) @ codes.T
            loss = loss + 0.3 * F.cross_entropy(own, boxes[found].view(-1))
            right = float((logits[found].argmax(-1) == kinds[found].nan_to_num().argmax(-1)).float().mean())
        return loss, right, float(place.detach())


@torch.no_grad()
def start_rows(
    rows: Tensor, embeddings: Tensor, tokenizer: PreTrainedTokenizerBase, task: CellTask, seed: int = 0
) -> None:
    """The embeddings of the new tokens, in place: a tag's words; a number's place and a sign of its own.

    Args:
        rows: (new tokens, hidden), in the order in which `build_small` adds them.
        embeddings: (V, hidden), of the language model's own tokens.
    """
    generator, ids = torch.Generator().manual_seed(seed), tokenizer.get_vocab()
    for row, text in zip(rows, START_TAGS, strict=False):
        row.copy_(embeddings[tokenizer(text)["input_ids"]].mean(0))
    digits = embeddings[[ids[digit] for digit in "0123456789"]].mean(0)
    turns = torch.linspace(0, 1, len(NUMBERS))[:, None]
    coarse = place_code(turns.expand(-1, 2)) * PLACE_NORM / (PLACE / 2) ** 0.5 / 2**0.5
    fine = number_waves(FINE_CYCLES, len(NUMBERS)) * 0.5
    waves = WAVE_GAIN * torch.cat([coarse, fine], dim=1) @ task.directions.T
    rows[len(TAGS) : len(TAGS) + len(NUMBERS)] = digits + waves + 0.03 * torch.randn(waves.shape, generator=generator)
    rows[-1] = embeddings.mean(0)  # `IMAGE_TOKEN`, which is never read
    if ids[IMAGE_TOKEN] != len(embeddings) + len(rows) - 1:
        raise ValueError(f"{IMAGE_TOKEN} is not the last token")


def train_projector(
    projector: nn.Module,
    task: CellTask,
    features: NDArray[np.float16],
    scenes: Sequence[Scene | None],
    steps: int,
    report: Callable[..., None],
    batch: int = 16,
) -> None:
    """Train a fresh projector on `task`; then its content gets the size that embeddings have, times `GAIN`."""
    known = [i for i, scene in enumerate(scenes) if scene is not None]
    targets = {i: targets_of(scene) for i in known if (scene := scenes[i]) is not None}
    sample = np.sort(np.random.default_rng(0).choice(known, min(64, len(known)), replace=False))
    standardize(projector.linear_1, torch.from_numpy(features[sample].astype(np.float32)).flatten(0, 1))
    parameters = [*projector.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.051, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        index = np.sort(np.random.default_rng([1, step]).choice(known, min(batch, len(known)), replace=False))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = projector(torch.from_numpy(features[index].astype(np.float32)))
        loss, right, place = task(tokens.float(), *stacked([targets[i] for i in index]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report("projector", step, loss.item(), right, place)
    _scale(projector, task, features[sample])


def stacked(targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([t.kinds for t in targets])), torch.from_numpy(
        np.stack([t.boxes for t in targets])
    )


@torch.no_grad()
def _scale(projector: nn.Module, task: CellTask, features: NDArray[np.float16]) -> None:
    """Everything but the place, at the root mean square of embeddings."""
    across = task.directions[:, :PLACE] @ task.directions[:, :PLACE].T
    tokens = projector(torch.from_numpy(features.astype(np.float32)))
    factor = CONTENT_RMS / (tokens - tokens @ across).square().mean().sqrt()
    turn = across + factor * (torch.eye(len(across)) - across)
    projector.linear_2.weight.copy_(GAIN * turn @ projector.linear_2.weight)
    projector.linear_2.bias.copy_(GAIN * turn @ projector.linear_2.bias)
    task.gain.fill_(GAIN)
    task.scale.div_(factor)
    task.box.weight.copy_(task.box.weight @ torch.linalg.inv(turn))
