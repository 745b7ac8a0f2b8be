"""The field `bbox` of a record: where its evidence lies.

`[x1, y1, x2, y2]` lies in the first image; `{"image": 2, "box": [x1, y1, x2, y2]}` in the second; in a record about a
series, `{"slice": 17, "box": […]}` in slice 17. All numbers are fractions of the whole upright image, 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitos.core.geometry import Box, cut
from vitos.data.fields import Report, show
from vitos.data.picture import parse_selector, split_name
from vitos.data.series import Series


def parse_evidence(
    raw: object, images: Sequence[Path], series: Series | None, report: Report
) -> tuple[Box, ...] | None:
    """The boxes of `bbox`, None where it is null or empty; each shows in the crop of its image.

    Args:
        raw: the field as decoded from JSON.
        images: the record's images; empty if they are not known, and nothing is checked against them then.
        series: the series, in a record about one.
        report: told of every problem.
    """
    if raw is None or raw == []:
        return None
    if not isinstance(raw, list):
        report("bbox", f"is {show(raw)}, not a list of boxes", "write [[x1, y1, x2, y2], …]")
        return None
    if not any(isinstance(item, list | dict) for item in raw) and len(raw) == 4:
        report("bbox", f"is one bare box {show(raw)}", "wrap it in a list: [[x1, y1, x2, y2]]")
        return None
    boxes = [_parse_box(item, f"bbox[{index}]", images, series, report) for index, item in enumerate(raw)]
    return tuple(box for box in boxes if box is not None)


def _parse_box(raw: object, field: str, images: Sequence[Path], series: Series | None, report: Report) -> Box | None:
    wanted = 'write {"slice": 17, "box": [x1, y1, x2, y2]}' if series else "write [x1, y1, x2, y2]"
    edges, place = (raw, 1) if isinstance(raw, list) and series is None else _unwrapped(raw, series)
    if not isinstance(edges, list) or len(edges) != 4:
        report(field, f"is {show(raw)}, not four numbers", wanted)
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in edges):
        report(field, f"is {show(raw)}, not four numbers", wanted)
        return None
    if isinstance(place, str):
        report(field, place, "correct the number, or leave the box out")
        return None
    if images and place > len(images):
        report(field, f"lies in image {place}, but there are {len(images)}", "correct the number, counted from 1")
        return None
    try:
        x1, y1, x2, y2 = map(float, edges)
        box = Box.snapped(x1, y1, x2, y2, place)
    except (ValueError, OverflowError) as error:
        report(field, str(error), "write fractions of width and height (pixels divided by the image's size)")
        return None
    crop = parse_selector(split_name(images[place - 1])[1]).crop if images else None
    if crop is not None and cut(box, crop) is None:
        report(field, f"{show(raw)} lies outside the image's crop", "boxes are fractions of the whole image")
        return None
    return box


def _unwrapped(raw: object, series: Series | None) -> tuple[object, int | str]:
    """The four numbers of a box with its image or slice, and its place, or what is wrong with that."""
    key = "image" if series is None else "slice"
    if not isinstance(raw, dict) or set(raw) != {key, "box"}:
        return None, 1
    number = raw[key]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        return raw["box"], f"has the {key} {show(number)}, not a whole number from 1"
    if series is None:
        return raw["box"], number
    try:
        return raw["box"], series.place(number)
    except ValueError as error:
        return raw["box"], str(error)
