"""The folder of a run: what was asked, each answer and the time it took. All figures are made from these files.

    bench.json                              models, benchmarks, settings, conditions
    questions/<benchmark>.jsonl             id, kind, question, gold answer and boxes, meta
    unusable/<benchmark>.jsonl              rows of a release that make no question, and why
    answers/<model>/<benchmark>/<n>.jsonl   answers of process n, one per line
    times/<model>/<benchmark>/<n>.jsonl     seconds, one condition of one batch per line
    images/<model>/<benchmark>/<n>.jsonl    how each question's images were opened, and the grid of its visual tokens
    left_out/<model>/<benchmark>/<n>.jsonl  records whose image could not be opened, and why

The answers to one condition of one batch are appended together. A killed process leaves at most one line that is cut
off; it is removed when the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.data.files import write_json_atomic, write_text_atomic

FORMAT = 1
MANIFEST = "bench.json"
StoredRow = dict[str, Any]
"""One line of a JSONL file of the folder."""

KINDS = ("answers", "times", "images", "left_out")

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class EvalFolder:
    """Reads and writes the folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- what was asked ---------------------------------------------------------------------------------------------

    def open_run(
        self,
        manifest: Mapping[str, Any],
        questions: Mapping[str, Sequence[Record]],
        unusable: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        """Begin a run, or go on with one: new models, benchmarks, selectors and budgets are added.

        Raises:
            ValueError: if the folder holds answers to other questions, of another model with the same name or with
                other settings.
        """
        old = self.manifest() if (self.path / MANIFEST).is_file() else {}
        merged = dict(manifest)
        for part in ("models", "benchmarks"):
            before = old.get(part, {})
            for name, value in manifest[part].items():
                if name in before and before[name] != value:
                    raise ValueError(
                        f"{self.path} holds answers of another {part[:-1]} {name!r}: {before[name]} there, {value} "
                        "now; use another folder"
                    )
            merged[part] = before | manifest[part]
        if old and old["settings"] != manifest["settings"]:
            was, now = old["settings"], manifest["settings"]
            raise ValueError(f"{self.path} holds answers made with {was}, now {now}; use another folder")
        merged["conditions"] = list(dict.fromkeys([*old.get("conditions", ()), *manifest["conditions"]]))
        (self.path / "questions").mkdir(parents=True, exist_ok=True)
        for name, records in questions.items():
            lines = (json.dumps(_question(record), ensure_ascii=False) for record in records)
            write_text_atomic(self._questions(name), "".join(f"{line}\n" for line in lines))
        for name, rows in (unusable or {}).items():
            if rows:
                self._unusable(name).parent.mkdir(exist_ok=True)
                lines = (json.dumps({"row": row, "reason": why}, ensure_ascii=False) for row, why in rows)
                write_text_atomic(self._unusable(name), "".join(f"{line}\n" for line in lines))
        write_json_atomic(self.path / MANIFEST, merged)

    def manifest(self) -> dict[str, Any]:
        """Content of `bench.json`.

        Raises:
            ValueError: if it is missing, or another version of vitos wrote it.
        """
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(f"{self.path} holds no {MANIFEST}; name the folder of a `vitos bench run`")
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{file}: format {data.get('format')!r}, not {FORMAT}; another version of vitos wrote it")
        return data

    def questions(self, benchmark: str) -> list[Record]:
        """The records of a benchmark, without their images."""
        return [
            Record(
                row["id"],
                (),
                row["question"],
                row["gold"],
                tuple(Box.from_json(box) for box in row["gold_boxes"]) if row["gold_boxes"] is not None else None,
                row["meta"],
                row["kind"],
                tuple(row.get("accepted", ())),
                row.get("tolerance", ""),
            )
            for row in read_rows(self._questions(benchmark))
        ]

    # --- answers and times ------------------------------------------------------------------------------------------

    def answers(self, model: str, benchmark: str) -> dict[str, dict[str, StoredRow]]:
        """Rows of all processes by condition and question id; the last one if a question was answered twice."""
        found: dict[str, dict[str, StoredRow]] = {}
        for row in self._rows("answers", model, benchmark):
            found.setdefault(row["condition"], {})[row["id"]] = row
        return found

    def times(self, model: str, benchmark: str) -> list[StoredRow]:
        """Rows of seconds of all processes."""
        return list(self._rows("times", model, benchmark))

    def images(self, model: str, benchmark: str) -> dict[str, StoredRow]:
        """Rows by question id: how its images were opened, and the grid of its visual tokens."""
        return {row["id"]: row for row in self._rows("images", model, benchmark)}

    def left_out(self, model: str) -> list[dict[str, str]]:
        """Rows that make no question, and records that a model could not be asked about, each once with its reason."""
        found = []
        for name in self.manifest()["benchmarks"]:
            if (file := self._unusable(name)).is_file():
                found += [{"dataset": name, "id": row["row"], "reason": row["reason"]} for row in read_rows(file)]
            asked = self.images(model, name)
            reasons = {row["id"]: row["reason"] for row in self._rows("left_out", model, name)}
            found += [{"dataset": name, "id": i, "reason": why} for i, why in reasons.items() if i not in asked]
        return found

    def append(self, kind: str, model: str, benchmark: str, process: int, rows: Iterable[StoredRow]) -> None:
        """Add lines to this process's file of one of `KINDS`."""
        file = self._folder(kind, model, benchmark) / f"{process}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with file.open("a", encoding="utf-8", newline="\n") as out:
            out.write(text)

    def mend(self, model: str, benchmark: str, process: int) -> None:
        """Remove the line that a killed process left cut off."""
        for kind in KINDS:
            file = self._folder(kind, model, benchmark) / f"{process}.jsonl"
            if file.is_file() and (data := file.read_bytes()) and not data.endswith(b"\n"):
                with file.open("r+b") as cut:
                    cut.truncate(data.rfind(b"\n") + 1)

    def _rows(self, kind: str, model: str, benchmark: str) -> Iterable[StoredRow]:
        for file in sorted(self._folder(kind, model, benchmark).glob("*.jsonl")):
            yield from read_rows(file)

    def _folder(self, kind: str, model: str, benchmark: str) -> Path:
        return self.path / kind / file_name(model) / file_name(benchmark)

    def _questions(self, benchmark: str) -> Path:
        return self.path / "questions" / f"{file_name(benchmark)}.jsonl"

    def _unusable(self, benchmark: str) -> Path:
        return self.path / "unusable" / f"{file_name(benchmark)}.jsonl"


def read_rows(file: Path) -> list[StoredRow]:
    """All complete lines of a JSONL file; a last line that is cut off is left out.

    Raises:
        ValueError: for any other line that is not JSON, with file and line.
    """
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}); remove the line and run again") from error
    return rows


def file_name(name: str) -> str:
    """A name as one part of a path; different names stay different."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "unnamed"
    return safe if safe == name else f"{safe}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def weights_fingerprint(folder: Path) -> str:
    """A short name for a checkpoint's weights: sizes and samples of its safetensors files, and its `vitos.json`."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for part in range(_SAMPLES):
                data.seek(max(0, size - _SAMPLE_BYTES) * part // (_SAMPLES - 1))
                digest.update(data.read(_SAMPLE_BYTES))
    for file in (folder / "vitos.json", folder / "preprocessor_config.json"):
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()


def questions_fingerprint(records: Sequence[Record]) -> str:
    """A short name for a list of questions with their answers."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(json.dumps(_question(record), sort_keys=True).encode())
    return digest.hexdigest()


def _question(record: Record) -> StoredRow:
    boxes = None if record.boxes is None else [box.to_json() for box in record.boxes]
    return {
        "id": record.id,
        "kind": record.kind,
        "question": record.question,
        "gold": record.answer,
        "gold_boxes": boxes,
        "meta": dict(record.meta),
        **({"accepted": list(record.accepted)} if record.accepted else {}),
        **({"tolerance": record.tolerance} if record.tolerance else {}),
    }
