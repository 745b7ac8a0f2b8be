"""Grades on disk: one SQLite file, which several processes may share."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path


class JudgeError(RuntimeError):
    """The judge cannot be used at all: a wrong address, name or key, or a damaged cache."""


def default_cache() -> Path:
    """`judge.sqlite` in the user's cache folder of vitos."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vitos" / "judge.sqlite"


class GradeCache:
    """Known grades by key. Only keys and grades are stored, no texts.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     cache = GradeCache(Path(folder, "judge.sqlite"))
    ...     cache.put(grade_key("model", "prompt", "question"), 0.5)
    ...     list(cache.get([grade_key("model", "prompt", "question"), "another"]).values())
    [0.5]
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """The grades that are known.

        Raises:
            JudgeError: if the file is no cache.
        """
        found: dict[str, float] = {}
        if not self.file.is_file():
            return found
        with self._open() as database:
            for key in keys:
                row = database.execute("SELECT grade FROM grades WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = float(row[0])
        return found

    def put(self, key: str, grade: float) -> None:
        """Keep a grade; it is on disk when the call returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO grades VALUES (?, ?)", (key, grade))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            # A connection for each use: it may not be shared between threads, nor survive a fork.
            with closing(sqlite3.connect(self.file, timeout=60)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS grades (key TEXT PRIMARY KEY, grade REAL NOT NULL)")
                yield database
        except sqlite3.Error as error:
            raise JudgeError(
                f"{self.file}: the cache of grades cannot be used ({error}); remove the file, or name another"
            ) from error


def grade_key(*parts: object) -> str:
    """A key that differs where any of the parts differs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
