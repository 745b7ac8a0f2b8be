"""Data sets between Hugging Face parquet (or hub) and the JSON format with an images folder.

| parquet column | JSON field |
| --- | --- |
| `image` (or `images`): struct<bytes, path>, or a list of those | `image_path`, files in `images/` |
| `question`, `answer`, `id`, `kind`, `tolerance` | the same |
| `accepted`: list<string>, null for none | the same |
| `bbox`: list<list<float64>>, null if unknown | `bbox` |
| any other column of text, numbers or truth values | a text in `meta`, if not null |

Image bytes are copied and never encoded again. A file is named by the SHA-256 of its content, so an image with many
questions is stored once. Splits keep their names: `train.json` ↔ `train-00000-of-00001.parquet`. The target folder
appears when it is complete, or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vitos.core.record import Record
from vitos.data.fields import show
from vitos.data.files import atomic_folder, write_json_atomic
from vitos.data.images import DataError, open_header
from vitos.data.picture import split_name
from vitos.data.readers import HUB_PREFIX, iter_entries, parse_entry, record_files

ROWS_PER_GROUP = 100  # as Hugging Face writes images: a reader holds one group in memory

_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
_IMAGE_COLUMNS = ("image", "images")
_COLUMNS = ("id", "question", "answer", "kind", "accepted", "tolerance", "bbox")
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

Row = dict[str, Any]


def convert(
    source: str | Path,
    target_dir: Path,
    *,
    to: Literal["json", "parquet"],
    limit: int | None = None,
    shard_rows: int = 1000,
) -> int:
    """Convert a data set and return the number of its records.

    Args:
        source: for "json", a parquet file, a folder of them or `hub:owner/name`; for "parquet", a record file or a
            folder of them.
        target_dir: a folder that does not exist or is empty; written as `<target_dir>.partial`, then renamed.
        to: the format to write.
        limit: number of records to take from each split; None: all.
        shard_rows: number of records per parquet file.

    Raises:
        DataError: the source cannot be read or has an invalid record (named), the target is not empty, or the disk
            is full. Nothing is left behind.
        ValueError: `limit` or `shard_rows` is not positive, or `to` is unknown.
    """
    if to not in ("json", "parquet"):
        raise ValueError(f"to must be json or parquet, got {to!r}")
    if shard_rows < 1 or (limit is not None and limit < 1):
        raise ValueError(f"limit and shard_rows must be at least 1, got {limit} and {shard_rows}")
    # Found before anything is written: a wrong source leaves no folder behind, not even the target's parents.
    if to == "json":
        splits = _open_splits(source)
        return written(target_dir, lambda partial: write_rows(splits, partial, limit))
    files = record_files(source)
    return written(target_dir, lambda folder: sum(_write_parquet(f, folder, limit, shard_rows) for f in files))


def write_records(records: Mapping[str, Sequence[Record]], target_dir: Path) -> int:
    """Write records, split → records, as `<split>.json` and an images folder; returns their number.

    Args:
        target_dir: a folder that does not exist or is empty.

    Raises:
        DataError: as `convert`.
    """
    splits = {split: ((record.id, _row_of(record)) for record in found) for split, found in records.items()}
    return written(target_dir, lambda partial: write_rows(splits, partial, None))


def written(target_dir: Path, write: Callable[[Path], int]) -> int:
    """Write a data set to a folder that appears when it is complete.

    Raises:
        DataError: if the target is not empty or the disk is full.
    """
    try:
        with atomic_folder(target_dir) as partial:
            return write(partial)
    except FileExistsError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        if error.errno in _FULL_DISK:
            message = f"{target_dir}: the disk is full; nothing was kept. Free some space or name another folder"
            raise DataError(message) from error
        raise


def image_suffix(data: bytes, name: Path) -> str:
    """The suffix of an image file with this content, such as `.png`; `name` is only named in errors.

    Raises:
        ImageError: for what is no image by its header.
    """
    image_format = open_header(io.BytesIO(data), name).format or ""
    return _SUFFIXES.get(image_format, f".{image_format.lower()}")


# Parquet or hub → JSON


def write_rows(splits: Mapping[str, Iterable[tuple[str, Row]]], folder: Path, limit: int | None) -> int:
    """Write `<split>.json` for each split, rows given as (sample, row), and the images.

    Raises:
        DataError: at the first row that is no valid record, naming its sample.
    """
    store = ImageStore(folder)
    total = 0
    for split, rows in splits.items():
        items = []
        seen: dict[str, str] = {}
        for index, (sample, row) in enumerate(itertools.islice(rows, limit)):
            item = _to_item(row, sample, store)
            entry = parse_entry(item, sample=sample, default_id=f"{split}/{index}", root=folder, seen=seen)
            if entry.problems:
                raise DataError(str(entry.problems[0]))
            items.append(item)
        write_json_atomic(folder / f"{split}.json", items)
        total += len(items)
    return total


class ImageStore:
    """The image files of one folder, one for each distinct content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"
        self.folder.mkdir()
        self._names: dict[str, str] = {}  # SHA-256 → file name

    def add(self, data: bytes, sample: str) -> str:
        """Store an image unless it is there, and return its path relative to the data set."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._names:
            suffix = image_suffix(data, Path(sample))
            name = digest[:16] + suffix
            if (self.folder / name).exists():  # 64 bits can be made to collide on purpose
                name = digest + suffix
            (self.folder / name).write_bytes(data)
            self._names[digest] = name
        return f"images/{self._names[digest]}"


def _to_item(row: Row, sample: str, store: ImageStore) -> dict[str, object]:
    """A parquet row in the JSON format; its fields are validated by `parse_entry`."""
    images = next((row[name] for name in _IMAGE_COLUMNS if name in row), None)
    if images is None:
        raise DataError(f"{sample}, image: is missing; a column `image` holds struct<bytes, path> or a list of those")
    images = images if isinstance(images, list) else [images]
    item: dict[str, object] = {"image_path": [store.add(_image_bytes(image, sample), sample) for image in images]}
    item |= {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    if type(item.get("id")) is int:
        item["id"] = str(item["id"])
    meta = {}
    for name, value in row.items():
        if name in _COLUMNS or name in _IMAGE_COLUMNS or value is None:
            continue
        if not isinstance(value, str | int | float):
            raise DataError(f"{sample}, {name}: {show(value)} does not fit into meta; drop this column first")
        meta[name] = str(value)
    return item | ({"meta": meta} if meta else {})


def _image_bytes(image: object, sample: str) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        problem = f"{show(image)} holds no bytes"
        raise DataError(f"{sample}, image: {problem}; write the images into the parquet file (struct<bytes, path>)")
    return data


def _open_splits(source: str | Path) -> dict[str, Iterable[tuple[str, Row]]]:
    """Split → its rows, read lazily, each with the name that errors give it."""
    name = str(source)
    if name.startswith(HUB_PREFIX):
        return _open_hub(name.removeprefix(HUB_PREFIX))
    path = Path(source)
    # Not deeper: subfolders with shards of the same name are different configurations, not one data set.
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]) if path.is_dir() else [path]
    if not files or not path.exists() or files[0].suffix != ".parquet":
        raise DataError(f"{path}: no .parquet file there; check the path (a hub data set is written hub:owner/name)")
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.stem)
        splits.setdefault(shard["split"] if shard else file.stem, []).append(file)
    return {split: itertools.chain.from_iterable(map(_parquet_rows, shards)) for split, shards in splits.items()}


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with pq.ParquetFile(file) as table:
            index = 0
            for batch in table.iter_batches(batch_size=ROWS_PER_GROUP):
                for row in batch.to_pylist():
                    yield f"{file.name}[{index}]", row
                    index += 1
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a readable parquet file ({error}); download it again") from error


def _open_hub(name: str) -> dict[str, Iterable[tuple[str, Row]]]:
    """All splits of a hub data set, streamed, images as bytes; network and access errors are those of `datasets`."""
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"{HUB_PREFIX}{name}: a hub data set is written hub:owner/name")
    try:
        import datasets  # slow to import, and only this source needs it
    except ModuleNotFoundError as error:
        raise DataError(f"{HUB_PREFIX}{name}: needs datasets; install it with pip install 'vitos[hub]'") from error

    splits: dict[str, Iterable[tuple[str, Row]]] = {}
    for split, rows in datasets.load_dataset(name, streaming=True).items():
        for column in _IMAGE_COLUMNS:
            feature = (rows.features or {}).get(column)
            undecoded = datasets.Image(decode=False)
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, undecoded)
            elif isinstance(feature, datasets.List):
                rows = rows.cast_column(column, datasets.List(undecoded))
        splits[str(split)] = ((f"{name}/{split}[{index}]", row) for index, row in enumerate(rows))
    return splits


# JSON → parquet


def _write_parquet(file: Path, folder: Path, limit: int | None, shard_rows: int) -> int:
    """Write the records of one file as `<stem>-<shard>-of-<shards>.parquet`."""
    records = []
    for entry in iter_entries(file, limit=limit):
        if entry.record is None:
            raise DataError(str(entry.problems[0]))
        records.append(entry.record)
    schema = _schema(records)
    shards = [records[start : start + shard_rows] for start in range(0, len(records), shard_rows)]
    for index, shard in enumerate(shards):
        path = folder / f"{file.stem}-{index:05d}-of-{len(shards):05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(shard), ROWS_PER_GROUP):
                rows = [_row_of(record) for record in shard[start : start + ROWS_PER_GROUP]]
                if not pa.types.is_list(schema.field("image").type):
                    rows = [row | {"image": row["image"][0]} for row in rows]
                writer.write_table(pa.Table.from_pylist(rows, schema))
    return len(records)


def _schema(records: Sequence[Record]) -> pa.Schema:
    """Columns of the records, with the metadata from which `datasets` knows that `image` holds images."""
    several = any(len(record.image_paths) > 1 for record in records)
    text = {"dtype": "string", "_type": "Value"}
    number = {"dtype": "float64", "_type": "Value"}
    image = {"_type": "Image"}
    # A list as [feature] is understood by every version of datasets; "List" and "Sequence" are not.
    columns: dict[str, tuple[pa.DataType, object]] = {
        "image": (pa.list_(_IMAGE_TYPE), [image]) if several else (_IMAGE_TYPE, image),
        "id": (pa.string(), text),
        "question": (pa.string(), text),
        "answer": (pa.string(), text),
        "bbox": (pa.list_(pa.list_(pa.float64())), [[number]]),
    }
    # Columns for open answers are written where there are any, so that files with letters alone stay as they were.
    given = {name for record in records for name in _open_fields(record)}
    optional: dict[str, tuple[pa.DataType, object]] = {
        "kind": (pa.string(), text),
        "accepted": (pa.list_(pa.string()), [text]),
        "tolerance": (pa.string(), text),
    }
    columns |= {name: column for name, column in optional.items() if name in given}
    for record in records:
        for name in record.meta:
            if name in _COLUMNS or name in _IMAGE_COLUMNS:
                raise DataError(f"{record.id}, meta: {name!r} is the name of another column; rename it")
            columns[name] = (pa.string(), text)
    features = {name: feature for name, (_, feature) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([(name, arrow) for name, (arrow, _) in columns.items()], metadata=metadata)


def _row_of(record: Record) -> Row:
    for path in record.image_paths:
        if split_name(path)[1]:
            raise DataError(f"{record.id}: {path.name} selects a part of a file, which parquet cannot; keep the JSON")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in record.image_paths]
    return {
        **record.meta,
        "image": images,
        "id": record.id,
        "question": record.question,
        "answer": record.answer,
        "bbox": None if record.boxes is None else [box.to_json() for box in record.boxes],
        **_open_fields(record),
    }


def _open_fields(record: Record) -> Row:
    """What a record says of its answer beyond a letter."""
    fields = {"kind": record.kind, "accepted": list(record.accepted), "tolerance": record.tolerance}
    return {name: value for name, value in fields.items() if value and value != "letter"}
