"""A folder of masks, `<category>/<image>.png`: what is not 0 is the finding, and each connected part of it a box."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from vitos.data.boxed import Annotations, Marked, find_pictures
from vitos.data.images import DataError, load_image


def read(source: Path, images: Path | None = None) -> Annotations:
    """One split, `train`. A mask has the name of its image in `images`; an image without a mask shows nothing."""
    masks = {folder.name: find_pictures(folder) for folder in sorted(source.glob("*/"))}
    if images is None or not masks:
        raise DataError(f"{source}: must have a folder of masks per category; name the folder of images with --images")
    pictures = find_pictures(images)
    for files in masks.values():
        if lost := sorted(set(files) - set(pictures)):
            raise DataError(f"{files[lost[0]]}: there is no image of this name; rename or remove the mask")
    return Annotations([*masks], {"train": _marked(masks, pictures)})


def _marked(masks: dict[str, dict[str, Path]], pictures: dict[str, Path]) -> Iterator[Marked]:
    for stem, path in pictures.items():
        marks: list[tuple[str, str, tuple[float, ...]]] = []
        sizes: set[tuple[int, ...]] = {load_image(path).size}
        for category, files in masks.items():
            if stem in files:
                values = np.asarray(load_image(files[stem])).any(axis=-1)  # (height, width)
                sizes.add(values.shape[::-1])
                # Pixels that touch at a corner are one part.
                numbered, _ = ndimage.label(values, structure=np.ones((3, 3)))
                for y, x in ndimage.find_objects(numbered):
                    marks.append((str(files[stem]), category, (x.start, y.start, x.stop, y.stop)))
        if len(sizes) > 1:
            raise DataError(f"{path}: image and masks have different sizes, {sorted(sizes)}; scale them alike")
        yield Marked(name=path.name, path=path, marks=marks)
