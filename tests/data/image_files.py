"""PNG and TIFF files written byte by byte, for what Pillow cannot write."""

import struct
import zlib

import numpy as np


def png(path, values, *, bits=16, colour, chunks=b""):
    """A PNG of `values`, shape (rows, columns) or (rows, columns, channels).

    Args:
        colour: colour type: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha.
        chunks: more chunks, as `chunk` makes them, before the pixels.
    """
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunks + body)
    return path


def chunk(name, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(path, *pages, order="<"):
    """A TIFF of some pages, made with `page`."""
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8))
    for number, (entries, strips) in enumerate(pages):
        last = number == len(pages) - 1
        start = len(out)
        more = start + 2 + 12 * (len(entries) + 2) + 4  # values that do not fit into an entry, then the strips
        sizes = [len(strip) for strip in strips]
        room = sum(-(-len(values) * {3: 2, 4: 4}[kind] // 4) * 4 for kind, values in entries.values())
        first = more + room + 8 * len(strips)
        offsets = [first + sum(sizes[:index]) for index in range(len(strips))]
        everything = entries | {273: (4, offsets), 279: (4, sizes)}
        directory, blob = b"", b""
        for tag in sorted(everything):
            kind, values = everything[tag]
            data = struct.pack(order + {3: "H", 4: "I"}[kind] * len(values), *values)
            data += b"\0" * (-len(data) % 4)
            if len(data) > 4:
                data, blob = struct.pack(f"{order}I", more + len(blob)), blob + data
            directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + data
        end = first + sum(sizes) + sum(sizes) % 2
        out += struct.pack(f"{order}H", len(everything)) + directory
        out += struct.pack(f"{order}I", 0 if last else end)
        out += (blob.ljust(first - more, b"\0") + b"".join(strips)).ljust(end - more, b"\0")
    path.write_bytes(out)
    return path


def page(values, photometric=1, *, order="<", extra=(), planes=False, deflated=False, subfile=None, without=()):
    """The tags and strips of one page.

    Args:
        values: shape (rows, columns) or (rows, columns, channels); their type is the file's.
        photometric: 0 WhiteIsZero, 1 BlackIsZero, 2 RGB.
        extra: kinds of the channels that are no colour: 0 nothing, 1 alpha that colours are multiplied by, 2 alpha.
        planes: channel after channel instead of pixel after pixel.
        subfile: 1 thumbnail, 2 page, 4 mask.
        without: tags to leave out.
    """
    values = np.asarray(values)
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    parts = list(np.moveaxis(values, -1, 0)) if planes else [values]
    strips = [part.astype(values.dtype.newbyteorder(order)).tobytes() for part in parts]
    entries = {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, [8 * values.dtype.itemsize] * channels),
        259: (3, [8 if deflated else 1]),
        262: (3, [photometric]),
        277: (3, [channels]),
        278: (3, [height]),
        284: (3, [2 if planes else 1]),
        339: (3, [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
    }
    entries |= {338: (3, list(extra))} if extra else {}
    entries |= {254: (4, [subfile])} if subfile is not None else {}
    kept = {tag: entry for tag, entry in entries.items() if tag not in without}
    return kept, [zlib.compress(strip) for strip in strips] if deflated else strips
