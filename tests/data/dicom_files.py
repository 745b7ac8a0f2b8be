"""DICOM files for tests, written with pydicom, and their pictures as `load_image` gives them."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from vitos.data.images import load_image

SECRET = "Jane^Doe"


def shipped(name):
    """A file inside pydicom's wheel; never downloaded."""
    return Path(get_testdata_file(name, download=False))


def write(path, values, interpretation="MONOCHROME2", *, syntax=ExplicitVRLittleEndian, raw=None, without=(), **tags):
    """A minimal DICOM file: (rows, columns) or (frames, rows, columns), or colour with a last axis of 3.

    Args:
        raw: tag → its bytes as they are, for what pydicom would not write.
        without: tags to leave out.
    """
    data = Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.PatientName, data.Modality = SECRET, "CT"
    colour = values.shape[-1] == 3
    shape = values.shape[:-1] if colour else values.shape
    if len(shape) == 3:
        data.NumberOfFrames = shape[0]
    data.Rows, data.Columns = shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = interpretation
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    if "BitsStored" in tags and "HighBit" not in tags:
        data.HighBit = data.BitsStored - 1
    for name, value in (raw or {}).items():
        tag = Tag(name)
        data[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, syntax.is_little_endian)
    for name in without:
        delattr(data, name)
    order = "<" if syntax.is_little_endian else ">"
    data.PixelData = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    data.save_as(path, enforce_file_format=True)
    return path


def ramp(dtype=np.int16, low=-1000, step=40, shape=(8, 10)):
    return (low + step * np.arange(np.prod(shape))).reshape(shape).astype(dtype)


def gray(path):
    pixels = np.asarray(load_image(path))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


def item(**tags):
    """A data set with these tags; LUTData and descriptors of look-up tables as 16-bit words."""
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
        if name in ("LUTDescriptor", "LUTData"):
            data[name].VR = "OW" if isinstance(value, bytes) else "US"
    return data


def table(entries, bits, first=0, count=None):
    """A sequence with one look-up table; `entries` are numbers, or bytes to write as they are."""
    count = len(entries) if count is None else count
    return Sequence([item(LUTDescriptor=[count & 0xFFFF, first & 0xFFFF, bits], LUTData=entries)])
