"""How far the training is: answers to held-out questions of the model as it would ship, beside linear probes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from nano_real.features import encode
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from small.lessons import Pictures
from small.projector import cell_of
from vitos.core.geometry import matched_iou
from vitos.core.record import Record
from vitos.data.readers import read_records
from vitos.nano.small import add_shipped
from vitos.policy.plans import Limits
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

LIMITS = Limits(max_tokens=48, max_evidence_tokens=140, evidence_only=True)
AT_POINT = ("cell_type_at_point", "point_on_nucleus")


def some(records: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """A sample with all templates as equally often as they allow."""
    order = np.random.default_rng(seed).permutation(len(records))
    by_template: dict[str, list[Record]] = defaultdict(list)
    for i in order:
        by_template[records[i].meta.get("template", "")].append(records[i])
    ranked = sorted((place, name, record) for name, own in by_template.items() for place, record in enumerate(own))
    return [record for _, _, record in ranked[:count]]


def shipped_policy(base: Path, weights: Mapping[str, Tensor]) -> SparseVLM:
    """The model that ships, in bfloat16."""
    policy = SparseVLM.from_pretrained(base, device="cpu")
    add_shipped(policy.backbone.model, weights)
    policy.backbone.model.bfloat16().eval()
    return policy


@torch.no_grad()
def look(policy: SparseVLM, own: Sequence[Record], unknown: Sequence[Record], batch: int = 48) -> dict[str, float]:
    """Figures of held-out questions.

    Args:
        own: the sets' questions, with boxes: asked of both branches, and of the reasoning branch behind own boxes.
        unknown: questions in words that were never trained on: asked of the reasoning branch.
    """
    out: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(own), batch):
        records = own[start : start + batch]
        queries = _queries(policy, records)
        findings = policy.answer(queries, limits=LIMITS)
        dense = policy.reason(queries, [policy.branches.reason_prompt(q) for q in queries], LIMITS.reason)
        for record, found, (rollout,) in zip(records, findings, dense, strict=True):
            name = record.meta["template"]
            right = float(rollout.response.answer == record.answer)
            out["dense"].append(right)
            out[f"dense/{name}"].append(right)
            out["option"].append(float(rollout.response.answer is not None))
            out["sparse"].append(float(found.answer == record.answer))
            out["kept"].append(found.kept_ratio)
            out["boxes"].append(float(bool(found.boxes)))
            iou = matched_iou(found.boxes, record.boxes or ())
            out["iou"].append(iou)
            out[f"iou/{name}"].append(iou)
    for start in range(0, len(unknown), batch):
        records = unknown[start : start + batch]
        queries = _queries(policy, records)
        asked = policy.reason(queries, [policy.branches.reason_prompt(q) for q in queries], LIMITS.reason)
        for record, (rollout,) in zip(records, asked, strict=True):
            out["unknown"].append(float(rollout.response.answer == record.answer))
            out["unknown_option"].append(float(rollout.response.answer is not None))
    return {name: float(np.mean(values)) for name, values in out.items()}


def _queries(policy: SparseVLM, records: Sequence[Record]) -> list[Query]:
    paths = sorted({record.image_paths[0] for record in records})
    scans = {path: policy.encode(path) for path in paths}
    return [Query.about(scans[r.image_paths[0]], r.question) for r in records]


def probes(pictures: Pictures, vision: Path, records: Sequence[Record]) -> dict[str, float]:
    """Accuracy of ridge classifiers on the frozen encoder's features, by template, on held-out questions.

    Of questions about a point they see the token there, of `tumour_type` the mean of all tokens: what is in the
    pixels, for those templates whose answer is a kind.
    """
    out = {}
    for name in (*AT_POINT, "tumour_type"):
        fit = [(i, r) for i, own in enumerate(pictures.records) for r in own if r.meta["template"] == name]
        test = [record for record in records if record.meta["template"] == name]
        if len(fit) < 30 or not test:
            continue
        seen = np.stack([_seen(pictures.features[i].astype(np.float32), r) for i, r in fit])
        shown = np.stack([_seen(f, r) for f, r in zip(_encoded(vision, test), test, strict=True)])
        out[name] = _ridge(seen, [_truth(r) for _, r in fit], shown, [_truth(r) for r in test])
    return out


def _truth(record: Record) -> str:
    return record.options[record.answer]


def _seen(features: np.ndarray, record: Record) -> np.ndarray:
    if record.meta["template"] not in AT_POINT or not record.boxes:
        return np.asarray(features.mean(0))
    box = record.boxes[0]
    return np.asarray(features[cell_of((box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2)])


@torch.no_grad()
def _encoded(vision: Path, records: Sequence[Record]) -> list[np.ndarray]:
    model = AutoModel.from_pretrained(vision, dtype="float32").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    out = []
    for record in records:
        with Image.open(record.image_paths[0]) as image:
            pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
        out.append(encode(model, [pixels], mean, std)[0].astype(np.float32))
    return out


def _ridge(x: np.ndarray, y: Sequence[str], shown: np.ndarray, truth: Sequence[str], weight: float = 30.0) -> float:
    """Share of the right classes of a ridge regression onto one-hot classes."""
    classes = sorted(set(y))
    mean, std = x.mean(0), x.std(0) + 1e-6
    given, wanted = (x - mean) / std, np.array([[float(c == one) for c in classes] for one in y])
    gram = given.T @ given + weight * np.eye(given.shape[1])
    best = ((shown - mean) / std @ np.linalg.solve(gram, given.T @ (wanted - wanted.mean(0))) + wanted.mean(0)).argmax(
        1
    )
    return float(np.mean([classes[i] == one for i, one in zip(best, truth, strict=True)]))


def questions(folder: Path, count: int) -> tuple[list[Record], list[Record]]:
    """Held-out questions to look at: the sets' own, and those in unknown words."""
    return some(read_records(folder / "val.json"), count), some(read_records(folder / "probe.json"), count)
