"""The model card of a trained checkpoint: Markdown with the front matter of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from vitos.reports import values as v
from vitos.reports.page import render
from vitos.reports.summary import summary
from vitos.reports.table import results_markdown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(results: Mapping[str, Any], recipe: Mapping[str, Any], base_model: str, license: str = "other") -> str:
    """The text of a checkpoint's `README.md`.

    Args:
        results: content of `results.json`.
        recipe: the resolved recipe. Absolute paths in it are cut to their last part, since a card is made to be
            published.
        base_model: hub id or folder; only a hub id is written into the front matter, as the hub asks for.
        license: the hub's identifier of a license; `other`: the terms of the base model hold.
    """
    datasets = str(results.get("dataset") or "").split(", ")
    results = {**results, "dataset": ", ".join(map(_without_folder, datasets))}
    hub_id = _HUB_ID.fullmatch(base_model) is not None
    front: dict[str, Any] = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base_model} if hub_id else {}),
        "tags": ["vitos", "medical", "visual-grounding", "reinforcement-learning", "token-pruning", "research-only"],
        "language": ["en"],
        **_model_index(results),
    }
    text = render(
        "card.md.j2",
        name=v.markdown_line(str(results.get("name") or "ViToS checkpoint")),
        version=v.markdown_line(str(results.get("vitos_version") or "")) or "(version not recorded)",
        base_model=base_model if hub_id else _without_folder(base_model),
        summary="\n\n".join(v.markdown_line(part) for part in summary(results)),
        tables=results_markdown(results),
        recipe=yaml.safe_dump(_publishable(recipe), sort_keys=False, allow_unicode=True, width=100),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}"


def _model_index(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as the hub lists them, `model-index` of the front matter; empty where there are none."""
    figures = {
        "sparse_accuracy": "Accuracy, tokens of its own boxes",
        "dense_accuracy": "Accuracy, all tokens",
        "kept_ratio": "Share of visual tokens kept",
        "mean_iou": "Mean IoU of its boxes",
    }
    metrics = [
        {"type": key.rpartition("_")[2], "name": name, "value": round(float(results[key]), 4)}
        for key, name in figures.items()
        if results.get(key) is not None
    ]
    if not metrics:
        return {}
    name, dataset = (v.markdown_line(str(results.get(key) or "unnamed")) for key in ("name", "dataset"))
    row = {"task": {"type": "visual-question-answering"}, "dataset": {"type": "custom", "name": dataset}}
    return {"model-index": [{"name": name, "results": [row | {"metrics": metrics}]}]}


def _publishable(value: Any) -> Any:
    """The value in plain YAML types, with absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        return {str(key): _publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item) for item in value]
    return _without_folder(str(value)) if isinstance(value, str | PurePath) else value


def _without_folder(text: str) -> str:
    """`/data/someone/train.json` → `train.json`; addresses of servers are left out; all other text stays."""
    if re.match(r"https?://", text):
        return "(address left out)"
    benchmark, equals, folder = text.partition("=")
    if text.startswith("benchmark:") and equals:
        return f"{benchmark}={_without_folder(folder)}"
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if re.match(r"[/~]|[A-Za-z]:[/\\]", text) else text
