"""The folder to train from: pictures, records about them, and what the frozen encoder sees in each.

images/         pictures of 224 x 224 pixels
train.json      records about composites of train images, phantoms, and VQA-RAD's train images, shuffled by image
probe.json      questions about held-out train images, in words and phrasings that are never trained on
val.json        the sets' own train questions about the held-out images
features.npy    (images of train.json in their order, 256, 768), float16
scenes.json     what is known of each picture of train.json; null where it is no composite
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano_real.features import HIDDEN, encode
from nano_real.questions import make_templates
from nano_real.scenes import SETS, TUMOURS, Scene, Source, patches
from PIL import Image
from rich.progress import track
from transformers import AutoModel

from small.pictures import FUNDUS, SMEARS, all_sources, picture
from small.rows import Asker, Row, radiology
from small.words import Words
from vitos.data.files import write_json_atomic
from vitos.data.phantom import write_phantoms

COUNTS = {"brain_tumor_mri": 1500, "blood_cells": 1500, "nuclei": 1200, FUNDUS: 900, SMEARS: 700}
RADIOLOGY_COPIES, PHANTOMS = 2, 300
BATCH = 16


def write_data(data: Path, folder: Path, seed: int, share: float = 1.0) -> None:
    """All but the features.

    Args:
        data: folder of the sets.
        share: of the pictures; less than 1 to try it out.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sources = all_sources(data)
    fit = [source for source in sources if not source.held_out]
    tumours = [box for source in fit for kind, box in source.scene.findings if kind in TUMOURS]
    asker = Asker(make_templates(tumours), Words(rng))
    made = _composites(fit, asker, folder, share)
    made += _radiology(data / "vqa_rad", asker, folder, share)
    made += _phantoms(folder, seed, round(PHANTOMS * share))
    made = [made[i] for i in rng.permutation(len(made))]
    rows = [row for _, own in made for row in own]
    write_json_atomic(folder / "train.json", rows)
    order = [own[0]["image_path"][0] for _, own in made]
    scenes = [None if s is None else {**dataclasses.asdict(s), "complete": sorted(s.complete)} for s, _ in made]
    write_json_atomic(folder / "scenes.json", {"images": order, "scenes": scenes})
    _probe([source for source in sources if source.held_out], make_templates(tumours), folder, seed)
    _val(data, sources, folder)


def _composites(
    fit: Sequence[Source], asker: Asker, folder: Path, share: float
) -> list[tuple[Scene | None, list[Row]]]:
    pool, rng = patches(fit), asker.rng
    made: list[tuple[Scene | None, list[Row]]] = []
    for domain, count in COUNTS.items():
        own = [source for source in fit if source.scene.domain == domain]
        for i in track(range(round(count * share)), f"pictures of {domain}"):
            pixels, scene = picture(own[i % len(own)], pool[domain], rng)
            rows = list(asker.rows(scene))
            if rows:
                made.append((scene, _with_image(rows, Image.fromarray(pixels), f"{domain}-{i:05}", folder)))
    return made


def _with_image(rows: list[Row], image: Image.Image, name: str, folder: Path) -> list[Row]:
    path = f"images/{name}.jpg"
    image.save(folder / path, quality=95)
    return [{"id": f"{name}/{i}", "image_path": [path], **row} for i, row in enumerate(rows)]


def _radiology(folder: Path, asker: Asker, out: Path, share: float) -> list[tuple[Scene | None, list[Row]]]:
    made: list[tuple[Scene | None, list[Row]]] = []
    for copy in range(RADIOLOGY_COPIES):
        asked = sorted(radiology(folder, asker).items())
        for path, rows in asked[: round(len(asked) * share)]:
            with Image.open(folder / path) as opened:
                image = opened.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            made.append((None, _with_image(rows, image, f"vqa_rad-{copy}-{Path(path).stem}", out)))
    return made


def _phantoms(folder: Path, seed: int, count: int) -> list[tuple[Scene | None, list[Row]]]:
    rows = json.loads(write_phantoms(folder / "phantoms", "train", count, seed=seed).read_text(encoding="utf-8"))
    made: list[tuple[Scene | None, list[Row]]] = []
    for row in rows:
        paths = row["image_path"] if isinstance(row["image_path"], list) else [row["image_path"]]
        told = {"template": row.get("template") or row["meta"]["template"], "form": "text"}
        kept: dict[str, Any] = {k: v for k, v in row.items() if k in ("question", "answer", "bbox")}
        made.append(
            (None, [{"id": f"phantom/{row['id']}", "image_path": [f"phantoms/{paths[0]}"], **kept, "meta": told}])
        )
    return made


def _probe(held: Sequence[Source], templates: Any, folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed + 1)
    asker = Asker(templates, Words(rng, held_out=True))
    rows: list[Row] = []
    for index, source in enumerate(held):
        pixels, scene = picture(source, [], rng, changed=False)
        asked = [row for row in asker.rows(scene) if row["kind"] == "letter" and "reworded" in _name(row)]
        asked += [
            r for r in asker.rows(scene) if r["kind"] == "letter" and _name(r) in ("at_point", "present", "modality")
        ]
        rows += _with_image(asked, Image.fromarray(pixels), f"probe-{index:04}", folder)
    write_json_atomic(folder / "probe.json", rows)


def _name(row: Row) -> str:
    return str(row["meta"]["template"])


def _val(data: Path, sources: Sequence[Source], folder: Path) -> None:
    held = {source.path: source for source in sources if source.held_out}
    rows = []
    for name in SETS:
        records = json.loads((data / name / "train.json").read_text(encoding="utf-8"))
        metas = json.loads((data / name / "meta.json").read_text(encoding="utf-8"))
        templates = [m["template"] for m in metas if m["split"] == "train"]
        for record, template in zip(records, templates, strict=True):
            path = data / name / record["image_path"][0]
            if path in held:
                target = folder / "images" / f"val-{name}-{path.name}"
                if not target.exists():
                    shutil.copyfile(path, target)
                rows.append({**record, "image_path": [f"images/{target.name}"], "template": template})
    write_json_atomic(folder / "val.json", rows)


@torch.no_grad()
def write_features(vision: Path, folder: Path) -> None:
    """What DINOv2 sees in each picture of train.json, made once.

    Args:
        vision: DINOv2's folder.
    """
    order = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))["images"]
    model = AutoModel.from_pretrained(vision, dtype="float32").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    partial = folder / ".features.npy"
    shape = (len(order), 256, 2 * HIDDEN)
    table = np.lib.format.open_memmap(partial, "r+" if partial.is_file() else "w+", np.float16, shape)
    done = int(np.searchsorted(-np.abs(table[:, 0, :8]).max(-1), 0.0))  # rows of a stopped run; the others are 0
    for start in track(range(done // BATCH * BATCH, len(order), BATCH), "encoding"):
        images = [
            Image.open(folder / path).convert("RGB").resize((224, 224), 3) for path in order[start : start + BATCH]
        ]
        with torch.autocast("cpu", torch.bfloat16):
            table[start : start + len(images)] = encode(model, [np.asarray(image) for image in images], mean, std)
    table.flush()
    partial.rename(folder / "features.npy")
