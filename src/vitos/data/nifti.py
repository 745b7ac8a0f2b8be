"""One slice of a NIfTI volume as it is stored; needs the `nifti` extra (nibabel).

Of the two axes that are left, the lower one runs to the right and the higher one down, both as stored. Nothing is
turned to a radiological orientation, so boxes are those of the stored voxels. Only shape, data type and the linear
scaling of the values are used from the header.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.data.gray import FloatArray, VolumeError
from vitos.data.picture import PictureSelector

SUFFIXES = (".nii", ".nii.gz")

_BROKEN = "broken, truncated or no NIfTI file; download or export it again"
_ERRORS = (OSError, EOFError, ValueError, TypeError, OverflowError, zlib.error, MemoryError)


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI, by its name; nibabel decides by the name as well."""
    return path.name.lower().endswith(SUFFIXES)


def read_slice(
    path: Path, selector: PictureSelector, check_size: Callable[[int, int], None]
) -> tuple[FloatArray, str]:
    """The selected slice, float (rows, columns), and its stored data type.

    Values that are not finite stay: NaN where there is nothing to see, such as outside the brain.

    Args:
        check_size: called with width and height before a value is read; raises to refuse.

    Raises:
        VolumeError: no nibabel, no slice named or out of range, more than three axes, or a broken file.
    """
    volume, shape, kind = _open(path)
    if selector.axis is None or selector.slice is None:
        raise VolumeError(f"a volume of {' x '.join(map(str, shape))}; name a slice, such as #axis=2&slice=0")
    if selector.slice >= shape[selector.axis]:
        last = shape[selector.axis] - 1
        raise VolumeError(f"slice={selector.slice} is not there; along axis {selector.axis} they are 0 to {last}")
    width, height = (n for axis, n in enumerate(shape) if axis != selector.axis)
    check_size(width, height)
    index = tuple(selector.slice if axis == selector.axis else slice(None) for axis in range(3))
    try:
        axes = len(volume.shape)
        values: NDArray[Any] = np.asarray(volume.dataobj[(*index, *(0,) * (axes - 3))[:axes]])
    except _ERRORS:
        raise VolumeError(_BROKEN) from None
    return values.astype(np.float64).T, str(kind)


def volume_size(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The three sizes of a volume in voxels, and of a voxel in mm (or the file's unit), along the stored axes.

    Raises:
        VolumeError: as `read_slice`, for a file that holds no single gray volume.
    """
    volume, shape, _ = _open(path)
    if not hasattr(volume.header, "get_zooms"):
        raise VolumeError("no volume of voxels (CIFTI keeps its values by surface point); give a NIfTI image")
    zooms = [float(size) for size in volume.header.get_zooms()[:3]]
    return shape, tuple([*zooms, 1.0][:3])


def _open(path: Path) -> tuple[Any, tuple[int, ...], np.dtype[Any]]:
    """The volume, its shape with three axes, and its data type; no value is read."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError:
        raise VolumeError("reading NIfTI needs nibabel; install it with pip install 'vitos[nifti]'") from None
    try:
        volume: Any = nibabel.load(path)
        shape, kind = tuple(volume.shape), volume.get_data_dtype()
    except (ImageFileError, *_ERRORS):
        raise VolumeError(_BROKEN) from None  # not chained: what nibabel says can quote the header
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:  # one slice, saved without its third axis
        shape = (*shape, 1)
    if len(shape) != 3:
        raise VolumeError(f"{len(shape)} axes ({' x '.join(map(str, shape))}); save the one volume as its own file")
    if kind.fields is not None or kind.kind not in "iuf":
        raise VolumeError(f"values of type {kind} are not gray; save it with one number per voxel")
    return volume, shape, kind
