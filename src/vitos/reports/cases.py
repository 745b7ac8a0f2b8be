"""All cases of an evaluation as the report's page reads them: texts and masks in one compressed block, and pictures.

The block is JSON, compressed by gzip, in base64; the page unpacks it when it is opened. Pictures are JPEGs, inside of
the page where they are few and in a folder beside it where they are many.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View
from vitos.core.record import IMAGE_PLACEHOLDER, parse_options
from vitos.data.files import atomic_write
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports import values as v
from vitos.reports.sheet import lay_out, placed

MAX_SIDE = 640
MAX_INSIDE = 256
"""Largest number of distinct pictures that are put inside of the page."""
MAX_BLOCK = 3_600_000
"""Largest size of the block, in characters; texts are cut until it fits."""
TEXT_LENGTHS = (1200, 800, 500, 300, 200, 120, 60)

_TAG = re.compile(r"</?(?:think|evidence|answer)>")
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseBlock:
    """All cases for the page.

    Attributes:
        block: base64 of compressed JSON.
        text_length: number of characters at which texts were cut; None: no text was cut.
        pictures: a source for each distinct picture: a data URI or a file name.
        templates, datasets: names to filter by, in the order of the test set.
        dense: name of the condition with all tokens that the sparse one is compared with; None: there is none.
    """

    block: str
    text_length: int | None
    pictures: tuple[str, ...]
    templates: tuple[str, ...]
    datasets: tuple[str, ...]
    dense: str | None


def pack_cases(cases: Sequence[Mapping[str, Any]], run_dir: Path, out: Path) -> CaseBlock:
    """Make the block, and write the pictures beside `out` where there are many.

    Args:
        cases: rows of `cases.jsonl`, in the order of the test set.
        run_dir: folder where relative image paths start.
        out: file of the page.

    Raises:
        ResultsError: if a field does not hold what the schema says; the message names it and the case.
        ImageError: if an image is missing or broken.
    """
    shown = [_images(case) for case in cases]
    paths = list(dict.fromkeys(shown))
    number = {path: index for index, path in enumerate(paths)}
    dense = next((name for name in ("dense", "base_dense", "localization") if _any_has(cases, name)), None)
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(lambda names: _picture([run_dir / name for name in names]), paths))
    rows = [_row(case, number[names], pictures[number[names]][1]) for case, names in zip(cases, shown, strict=True)]
    block, cut = _fitting(rows, dense)
    return CaseBlock(
        block=block,
        text_length=cut,
        pictures=_pictures([data for data, _ in pictures], out),
        templates=tuple(dict.fromkeys(str(case["template"]) for case in cases if case.get("template"))),
        datasets=tuple(dict.fromkeys(str(case["dataset"]) for case in cases if case.get("dataset"))),
        dense=dense,
    )


def _any_has(cases: Sequence[Mapping[str, Any]], condition: str) -> bool:
    return any(field(case, "conditions").get(condition) for case in cases)


def _fitting(rows: Sequence[Mapping[str, Any]], dense: str | None) -> tuple[str, int | None]:
    """The block, with texts as long as fit, and the length at which they were cut.

    The length is found on a sample, since thousands of cases take seconds to compress.
    """
    sample = rows[:: max(1, len(rows) // 500)]
    share = MAX_BLOCK * len(sample) / max(1, len(rows))
    fitting = (length for length in TEXT_LENGTHS if len(_packed(sample, dense, length)) <= share)
    length = next(fitting, TEXT_LENGTHS[-1])
    longest = max((len(c["thought"]) for row in rows for c in row["conditions"].values()), default=0)
    return _packed(rows, dense, length), length if longest > length else None


def _packed(rows: Sequence[Mapping[str, Any]], dense: str | None, length: int) -> str:
    whole = {"cases": [_shortened(row, length, dense) for row in rows], "dense": dense, "labels": v.LABELS}
    data = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


def _shortened(row: Mapping[str, Any], length: int, dense: str | None) -> dict[str, Any]:
    """The row with shorter texts; those of further conditions are the first to go."""
    shown = (dense, "localization", "sparse", "random")
    limits = {name: length if name in shown or length == TEXT_LENGTHS[0] else 60 for name in row["conditions"]}
    conditions = {name: {**c, "thought": _cut(c["thought"], limits[name])} for name, c in row["conditions"].items()}
    return {**row, "question": _cut(row["question"], 600), "conditions": conditions}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} …"


# --- one case -------------------------------------------------------------------------------------------------------


def _images(case: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(field(one, "image")) for one in (case, *case.get("others", ())))


def _row(case: Mapping[str, Any], picture: int, tiles: Sequence[Rect]) -> dict[str, Any]:
    """One case; places in several images are those in the sheet of all of them, whose tiles are given."""
    question = str(field(case, "question")).replace(IMAGE_PLACEHOLDER, "").strip()
    options = parse_options(question)
    grid = grid_of(case)
    gold = boxes_of(case, case.get("gold_boxes"), "gold_boxes")
    views = [(view, tile) for one, tile in zip(grid.images, tiles, strict=True) for view in one.views] if grid else []
    conditions = {
        name: _condition(case, name, row, options, grid, tiles)
        for name, row in field(case, "conditions").items()
        if row is not None and "@" not in name and name != "untrained_localization"
    }
    return {
        "id": str(field(case, "id")),
        "dataset": str(case.get("dataset") or ""),
        "template": str(case.get("template") or ""),
        "picture": picture,
        "question": question,
        "gold": spelled(case.get("gold"), options),
        "gold_boxes": [_rounded(placed(box, tiles[box.image - 1])) for box in gold],
        "grid": [[*_rounded(placed(view.rect, tile)), view.rows, view.cols] for view, tile in views],
        "shown": _rounded((len(tiles) == 1 and case.get("shown")) or WHOLE_IMAGE.as_tuple()),
        "conditions": conditions,
    }


def _condition(
    case: Mapping[str, Any],
    name: str,
    row: Mapping[str, Any],
    options: Mapping[str, str],
    grid: TokenGrid | None,
    tiles: Sequence[Rect],
) -> dict[str, Any]:
    thought, written = read_text(str(row.get("text") or ""))
    answer = spelled(row.get("answer"), options)
    if answer and not thought and written not in (answer, row["answer"], options.get(str(row["answer"]))):
        thought = written  # an answer in a sentence, without tags
    out: dict[str, Any] = {
        "thought": thought,
        "answer": answer,
        "written": "" if answer else _cut(written, 200),
        "correct": row.get("correct"),
    }
    if row.get("kept") is not None and grid is not None:
        out |= {"mask": _mask(case, name, row["kept"], grid.num_tokens), "count": len(row["kept"])}
        out["kept"] = round(len(row["kept"]) / grid.num_tokens, 4)
    if row.get("fallback"):
        out["fallback"] = True
    out |= {grade: value for grade in ("score", "judge") if (value := v.share(row, grade)) is not None}
    if "boxes" in row:
        boxes = boxes_of(case, row["boxes"], f"conditions.{name}.boxes")
        out |= {
            "boxes": [_rounded(placed(box, tiles[box.image - 1])) for box in boxes],
            "iou": row.get("iou"),
            "parsed": row.get("parsed"),
        }
    return out


def read_text(text: str) -> tuple[str, str]:
    """The thought and the written answer of a completion, without tags.

    >>> read_text("<think>it is round</think><evidence>[[0, 0, 1, 1]]</evidence><answer>A</answer>")
    ('it is round', 'A')
    >>> read_text("B. mass")
    ('', 'B. mass')
    """
    thoughts, answers = _THOUGHT.findall(text), _ANSWER.findall(text)
    if not thoughts and not answers:
        return "", _TAG.sub(" ", text).strip()
    return _plain(" ".join(thoughts)), _plain(" ".join(answers))


def _plain(text: str) -> str:
    return _TAG.sub(" ", text).strip()


def spelled(answer: object, options: Mapping[str, str]) -> str:
    """An option's letter with its text, `B. mass`; any other answer as it is; empty for none."""
    text = "" if answer is None else str(answer)
    return f"{text}. {options[text]}" if text in options else text


def _mask(case: Mapping[str, Any], name: str, kept: Sequence[int], count: int) -> str:
    """Base64 of a bit per token, the first token in the highest bit of the first byte."""
    with named(case, f"condition {name!r}"):
        if any(not 0 <= token < count for token in kept):
            raise ValueError(f"kept tokens must be in 0..{count - 1}, the grid's tokens")
    mask = np.zeros(count, dtype=bool)
    mask[list(kept)] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def grid_of(case: Mapping[str, Any]) -> TokenGrid | None:
    """The visual tokens of a case; None where it has none."""
    rows = case.get("grid")
    if not rows:
        return None
    with named(case, "field 'grid'"):
        return TokenGrid.joined([_grid_of_image(one) for one in (case, *case.get("others", ()))])


def _grid_of_image(stored: Mapping[str, Any]) -> TokenGrid:
    views = tuple(View(Rect(*row["rect"]), row["rows"], row["cols"]) for row in stored["grid"])
    return TokenGrid(views, Rect(*stored.get("shown", WHOLE_IMAGE.as_tuple())))


def boxes_of(case: Mapping[str, Any], rows: Sequence[Any] | None, name: str) -> list[Box]:
    """The boxes of a field of a case."""
    with named(case, f"field {name!r}"):
        return [Box.from_json(row) for row in rows or ()]


@contextmanager
def named(case: Mapping[str, Any], place: str) -> Iterator[None]:
    """A value that cannot be used is an error that names the case and the place."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise v.ResultsError(f"case {case.get('id')!r}, {place}: {error}") from error


def field(case: Mapping[str, Any], name: str) -> Any:
    """A field that every case has.

    Raises:
        ResultsError: if it is missing.
    """
    if name not in case:
        raise v.ResultsError(f"case {case.get('id')!r} has no field {name!r}; write cases.jsonl with `vitos eval`")
    return case[name]


# --- pictures -------------------------------------------------------------------------------------------------------


def _pictures(pictures: Sequence[bytes], out: Path) -> tuple[str, ...]:
    """A source for each picture: data URIs, or files that are written to a folder beside the page."""
    if len(pictures) <= MAX_INSIDE:
        return tuple(f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}" for data in pictures)
    folder = out.with_name(f"{out.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(pictures):
        with atomic_write(folder / f"{index}.jpg") as path:
            path.write_bytes(data)
    return tuple(f"{folder.name}/{index}.jpg" for index in range(len(pictures)))


def _picture(paths: Sequence[Path]) -> tuple[bytes, list[Rect]]:
    """JPEG of an image, or of a sheet of several, and the place of each image in it."""
    images = []
    for path in paths:
        image = load_image(without_crop(path)).convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        images.append(image)
    picture, tiles = (images[0], [WHOLE_IMAGE]) if len(images) == 1 else lay_out(images)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86, optimize=True)
    return buffer.getvalue(), tiles
