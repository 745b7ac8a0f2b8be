"""The model card of a trained checkpoint: Markdown with the front matter of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from vitos.reports import values as v
from vitos.reports.summary import summary
from vitos.reports.table import results_markdown

RESEARCH_ONLY = (
    "For research only. Not a medical device; not for diagnosis, treatment or any decision about a patient."
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_TEXT = """\
# {name}

> **{research_only}**

A vision-language model trained with vitos {version}, an implementation of ViToS (arXiv:2606.31599): it first looks at
the whole image and names the boxes that hold the evidence, then reasons over the visual tokens of those boxes alone.
Base model: `{base_model}`.

## Intended use

Research on grounded and token-sparse reasoning over medical images: multiple-choice questions about one image of the
kind it was trained on. The model was not evaluated for clinical use. Boxes show which tokens the answer was allowed to
use; they do not prove that the answer follows from them.

## How to use

The weights are an ordinary Hugging Face checkpoint. The file `vitos.json` holds the prompts, the coordinates of the
boxes and the rule by which tokens are kept; `vitos ask` reads it, plain `transformers` runs the model with all tokens.

## Results

{summary}

{tables}
## Training

The recipe, every value resolved (folders of the machine left out):

```yaml
{recipe}```

## Limits

- The figures hold for the data set named above; other scanners, populations and kinds of question are unknown.
- Where no box parses, the answer comes from all tokens; the share of such questions is given above.
- A finding that the first pass misses is out of sight of the second one, but for what fusion carries over.
- Answers can be wrong and sound sure; wrong boxes can look plausible.
- License and terms of the base model and of the training data still apply.
"""


def model_card(results: Mapping[str, Any], recipe: Mapping[str, Any], base_model: str, license: str = "other") -> str:
    """The text of a checkpoint's `README.md`.

    Args:
        results: content of `results.json`.
        recipe: the resolved recipe. Absolute paths in it are cut to their last part: a card is made to be published.
        base_model: hub id or folder; only a hub id is put into the front matter, as the hub asks for.
        license: an identifier of the hub; `other` leaves the terms to the base model's.
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
    }
    text = _TEXT.format(
        name=v.markdown_line(str(results.get("name") or "ViToS checkpoint")),
        research_only=RESEARCH_ONLY,
        version=v.markdown_line(str(results.get("vitos_version") or "")) or "(version not recorded)",
        base_model=base_model if hub_id else _without_folder(base_model),
        summary="\n\n".join(v.markdown_line(part) for part in summary(results)),
        tables=results_markdown(results),
        recipe=yaml.safe_dump(_publishable(recipe), sort_keys=False, allow_unicode=True, width=100),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}"


def _publishable(value: Any) -> Any:
    """Plain YAML types, absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        return {str(key): _publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item) for item in value]
    return _without_folder(str(value)) if isinstance(value, str | PurePath) else value


def _without_folder(text: str) -> str:
    """`/data/someone/train.json` → `train.json`; relative paths and all other text stay."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if re.match(r"[/~]|[A-Za-z]:[/\\]", text) else text
