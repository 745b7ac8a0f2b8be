"""Splits of phantoms on disk: what is there, what must not be replaced unasked, and which images belong to nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

IMAGES = "images"


@dataclass(frozen=True, slots=True)
class PhantomSettings:
    """What decides the content of a split: its number of questions, its seed, and its images' pixels per side.

    A size of 0 means that it is not known, because no image is left.
    """

    count: int
    seed: int
    size: int

    def __str__(self) -> str:
        return f"{self.count} questions of seed {self.seed} at {self.size} pixels"


def refuse_others(folder: Path, wanted: Mapping[str, PhantomSettings]) -> None:
    """Stop before a split that was made with other settings, or by other means, is replaced.

    Args:
        wanted: split → the settings that it is about to be written with.

    Raises:
        FileExistsError: naming each such split, what it holds and what was asked for.
    """
    others = []
    for split, settings in wanted.items():
        path = folder / f"{split}.json"
        if not path.exists():
            continue
        there = read_settings(path)
        if there is None:
            others.append(f"{path} was not made by vitos data phantom, or was changed since")
        elif there != settings and there != replace(settings, size=0):
            others.append(f"{path} holds {there}, not {settings}")
    _refuse(others)


def refuse_changed(path: Path, rows: Sequence[object]) -> None:
    """Stop before a split is replaced whose settings are those of `rows`, but whose content is not.

    Raises:
        FileExistsError: naming the file.
    """
    if path.exists() and _read_rows(path) != json.loads(json.dumps(rows)):
        _refuse([f"{path} was changed since it was made, or another version of vitos made it"])


def _refuse(others: Sequence[str]) -> None:
    if others:
        raise FileExistsError("; ".join(others) + "; name another folder, or pass --overwrite to replace it")


def read_settings(path: Path) -> PhantomSettings | None:
    """With which settings a split was made; None if its ids do not tell, or an image is broken."""
    rows = _read_rows(path)
    ids = [row.get("id") for row in rows or [] if isinstance(row, dict)]
    first = re.fullmatch(rf"{re.escape(path.stem)}/(\d+)/0", str(ids[0])) if ids else None
    if rows is None or first is None or ids != [f"{path.stem}/{first[1]}/{index}" for index in range(len(rows))]:
        return None
    made = PhantomSettings(len(rows), int(first[1]), 0)
    paths = (path.parent / image_name(str(ident)) for ident in ids)
    left = next((image_path for image_path in paths if image_path.exists()), None)
    if left is None:
        return made
    try:
        with Image.open(left) as image:
            return replace(made, size=image.width)
    except OSError:
        return None


def image_name(ident: str) -> str:
    """The image of a question, relative to its record file."""
    return f"{IMAGES}/{ident.replace('/', '_')}.png"


def remove_orphans(folder: Path, split: str, names: Sequence[str]) -> int:
    """Delete images of a split that no record file of the folder names; returns how many.

    Only files that are called as this split's images are: what an earlier writing left that had more questions,
    another seed, or was stopped.

    Args:
        names: images of the split that stay, as `image_name` gives them.
    """
    kept = set(names)
    left = [path for path in (folder / IMAGES).glob(f"{split}_*.png") if f"{IMAGES}/{path.name}" not in kept]
    left = [path for path in left if re.fullmatch(rf"{split}_\d+_\d+\.png", path.name)]
    others = [path for path in folder.iterdir() if path.suffix in (".json", ".jsonl") and path.stem != split]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in others] if left else []
    orphans = [path for path in left if not any(path.name in text for text in texts)]
    for path in orphans:
        path.unlink()
    return len(orphans)


def _read_rows(path: Path) -> list[object] | None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return rows if isinstance(rows, list) else None
