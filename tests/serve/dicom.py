"""A small CT file."""

import numpy as np
import pytest


def write_dicom(path, frames=1):
    """Write `frames` slices of 64 x 64 pixels, whose values rise from -1000 to 2000 HU; window 40,400."""
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    values = np.linspace(-1000, 2000, frames * 64 * 64).reshape(frames, 64, 64).astype(np.int16)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CT", "MONOCHROME2", 1
    data.Rows = data.Columns = 64
    data.NumberOfFrames, data.BitsAllocated, data.BitsStored, data.HighBit = frames, 16, 16, 15
    data.PixelRepresentation, data.WindowCenter, data.WindowWidth = 1, 40, 400
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path
