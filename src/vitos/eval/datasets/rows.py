"""Rows of a release's files, one by one. A `Damage` takes the place of a damaged row or file, and reading goes on.

Rows are named as users find them, with the file below the release's folder: `data/test-00000-of-00001.parquet[12]`,
`test.json[12]`, `MM/test.jsonl:13`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitos.data.images import DataError

ReleaseRow = dict[str, Any]

# A field of a CSV file may be long (captions): more than the 131,072 characters that the csv module allows.
_MAX_FIELD = 10_000_000


@dataclass(frozen=True, slots=True)
class Damage:
    """Why a row, a whole file or a row group is missing."""

    reason: str


class RowError(ValueError):
    """A row that cannot become a question. The message says why, without the name of the row."""


NamedRow = tuple[str, ReleaseRow | Damage]


def find(folder: Path, *patterns: str) -> list[Path]:
    """Files below `folder` that match the first of the patterns to match any, sorted.

    Raises:
        DataError: if none does, with the patterns.
    """
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    raise DataError(f"{folder}: holds no {' or '.join(patterns)}; check the folder and the split")


def parquet_rows(folder: Path, files: Sequence[Path]) -> Iterator[NamedRow]:
    """Rows of parquet files; if a row cannot be decoded, its whole row group is lost."""
    for file in files:
        name = _name(folder, file)
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            yield name, Damage(f"not a readable parquet file ({_short(error)}); download it again")
            continue
        with table:
            start = 0
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                try:
                    for index, row in enumerate(table.read_row_group(group).to_pylist(), start):
                        yield f"{name}[{index}]", row
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    reason = f"{count} rows cannot be decoded ({_short(error)}); download the file again"
                    yield f"{name}[{start}:{start + count}]", Damage(reason)
                start += count


def json_rows(folder: Path, files: Sequence[Path]) -> Iterator[NamedRow]:
    """Objects of JSON arrays."""
    for file in files:
        yield from json_array(_name(folder, file), file.read_bytes())


def json_array(name: str, content: bytes) -> Iterator[NamedRow]:
    """Objects of one JSON array, named after its file."""
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield name, Damage(f"not a readable JSON file ({_short(error)}); download it again")
        return
    if not isinstance(rows, list):
        yield name, Damage("holds no JSON array")
        return
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row if isinstance(row, dict) else Damage("is not a JSON object")


def jsonl_rows(folder: Path, files: Sequence[Path]) -> Iterator[NamedRow]:
    """Objects of JSON Lines, one per line."""
    for file in files:
        name = _name(folder, file)
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield f"{name}:{number}", Damage(f"is not JSON ({_short(error)})")
                continue
            yield f"{name}:{number}", row if isinstance(row, dict) else Damage("is not a JSON object")


def csv_rows(folder: Path, files: Sequence[Path]) -> Iterator[NamedRow]:
    """Rows of CSV files with a header line, as column → text."""
    csv.field_size_limit(_MAX_FIELD)
    for file in files:
        # Bytes that are not UTF-8 damage their own row, not the file: read as surrogates, found row by row.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines)
            index = 0
            while True:
                name = f"{_name(folder, file)}[{index}]"
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield name, Damage(f"is not CSV ({_short(error)})")
                    index += 1
                    continue
                if row is None:
                    break
                yield name, _check_csv_row(row)
                index += 1


def text_of(row: ReleaseRow, column: str) -> str:
    """The text in a column, without blanks at its ends.

    Raises:
        RowError: if the column is missing, null, of another type or blank.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is {'missing' if column not in row else 'no text'}")
    return value.strip()


def image_of(row: ReleaseRow, column: str = "image") -> bytes:
    """The image bytes in a row of parquet.

    Raises:
        RowError: if there are none.
    """
    value = row.get(column)
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes) or not data:
        raise RowError(f"{column} holds no image")
    return data


def labels(row: ReleaseRow, **columns: str) -> dict[str, str]:
    """Fields for tables: name → text in its column, where there is one."""
    found = {name: row.get(column) for name, column in columns.items()}
    return {name: str(value).strip() for name, value in found.items() if value is not None and str(value).strip()}


def _check_csv_row(row: dict[Any, Any]) -> ReleaseRow | Damage:
    if None in row:
        return Damage("has more fields than the header names")
    if None in row.values():
        return Damage("has fewer fields than the header names")
    if any("\udc80" <= letter <= "\udcff" for value in row.values() for letter in value):
        return Damage("holds bytes that are not UTF-8")
    return row


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
