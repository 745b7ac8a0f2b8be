"""How many visual tokens tell where they are? `python scripts/probe_places.py --work FOLDER [--model LEG ...]`.

A linear probe (least squares) reads a token's own place from what the encoder's layers say of it, and from what the
projector of each model makes of that. Fitted on three quarters of the scenes, scored on the others: the share of
tokens whose place is read within their own cell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from nano_real.features import HIDDEN, LAYERS, load_features
from nano_real.projector import GRID
from torch import Tensor

from vitos.policy.vlm import SparseVLM

SIDE = 16  # cells of GRID in a row


def own_cell_found(tokens: Tensor) -> float:
    """Share of tokens (n, 256, hidden) of the last quarter of the scenes."""
    centres = torch.from_numpy(GRID.centres())
    inputs = torch.cat([tokens.double(), torch.ones(*tokens.shape[:2], 1, dtype=torch.float64)], dim=-1)
    fitted = len(tokens) * 3 // 4
    weights = torch.linalg.lstsq(inputs[:fitted].flatten(0, 1), centres.repeat(fitted, 1)).solution
    off = (inputs[fitted:] @ weights - centres).abs()
    return (off < 0.5 / SIDE).all(-1).float().mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of make_nano_real.py")
    parser.add_argument("--model", nargs="*", default=[], help="legs in it whose projector is read as well")
    parser.add_argument("--scenes", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    _, features = load_features(args.work / "features")
    chosen = np.sort(np.random.default_rng(args.seed).choice(len(features), args.scenes, replace=False))
    seen = torch.from_numpy(features[chosen].astype(np.float32))
    for layer, tokens in zip(LAYERS, seen.split(HIDDEN, dim=-1), strict=True):
        print(f"layer {layer}  {own_cell_found(tokens):.2f}")
    for name in args.model:
        projector = SparseVLM.from_pretrained(args.work / name).backbone.model.model.multi_modal_projector
        print(f"{name}  {own_cell_found(projector(seen)):.2f}")


if __name__ == "__main__":
    main()
