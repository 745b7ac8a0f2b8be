"""Visual tokens of records: each distinct image is encoded once and kept in memory, or read from a cache on disk.

The encoder is frozen during reinforcement learning, so its output serves both branches, all rollouts and all epochs.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from vitos.core.record import Record
from vitos.data.images import load_image_facts
from vitos.policy.plans import Plan
from vitos.policy.types import Scan
from vitos.policy.vlm import SparseVLM
from vitos.scans.cache import EmbeddingCache


class RecentScans:
    """Scans by key; the least recently used ones are dropped beyond a size.

    Args:
        max_bytes: largest size of all scans together; 0 keeps none.
        size: a function that gives the size of a scan in bytes.
    """

    def __init__(self, max_bytes: int, size: Callable[[Scan], int]) -> None:
        self._max_bytes = max_bytes
        self._size = size
        self._scans: OrderedDict[Hashable, Scan] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> Scan | None:
        """The scan of a key, or None."""
        return self._scans.get(key)

    def keep(self, key: Hashable, scan: Scan) -> None:
        """Keep a scan that was just used; one that is too large is dropped at once."""
        if key not in self._scans:
            self._bytes += self._size(scan)
        self._scans[key] = scan
        self._scans.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, dropped = self._scans.popitem(last=False)
            self._bytes -= self._size(dropped)


class ScanStore:
    """Scans by record; the least recently used ones are dropped beyond a size.

    Args:
        policy: the policy whose encoder runs; the encoder must not change while the store is in use.
        max_bytes: largest size of all visual tokens that are kept; 0 keeps none.
        batch_size: number of records whose images are open at a time.
        cache: a cache to read from instead of encoding; it must fit the policy, which `EmbeddingCache.open` checks.
        plan: the plan that the scans are for; None for the policy's. If it needs pictures, the scans contain them
            (they do not count towards `max_bytes`). If it begins with a reduced image, that one is encoded.

    Raises:
        ValueError: for a cache and a plan that begins with reduced images.
    """

    def __init__(
        self,
        policy: SparseVLM,
        max_bytes: int = 4 << 30,
        batch_size: int = 32,
        cache: EmbeddingCache | None = None,
        plan: Plan | None = None,
    ) -> None:
        self._plan = plan or policy.plan
        if self._plan.reduced and cache is not None:
            raise ValueError(
                f"plan {self._plan.name} begins with reduced images, but an embedding cache contains whole ones; "
                "leave the cache out"
            )
        self._branches = policy.branches
        self._batch_size = batch_size
        self._cache = cache
        self._recent = RecentScans(max_bytes, visual_bytes)

    def get(self, records: Sequence[Record]) -> list[Scan]:
        """The scan of each record; missing ones are encoded or read now.

        Raises:
            ImageError: if an image cannot be read; the message names the file.
            CacheError: if there is a cache and it lacks an image, or the shard of an image is damaged.
        """
        wanted = {record.image_paths: self._recent.get(record.image_paths) for record in records}
        missing = [paths for paths, scan in wanted.items() if scan is None]
        found = {paths: scan for paths, scan in wanted.items() if scan is not None}
        for start in range(0, len(missing), self._batch_size):
            found |= self._load(missing[start : start + self._batch_size])
        for paths in wanted:
            self._recent.keep(paths, found[paths])
        return [found[record.image_paths] for record in records]

    def _load(self, groups: Sequence[tuple[Path, ...]]) -> dict[tuple[Path, ...], Scan]:
        """Scans of several records' images."""
        loaded = [[load_image_facts(path) for path in paths] for paths in groups]
        if self._cache is None:
            scans = [self._plan.scan(self._branches, [picture for picture, _ in images]) for images in loaded]
        else:
            scans = [
                Scan(tuple(self._cache.get(picture, path) for (picture, _), path in zip(images, paths, strict=True)))
                for images, paths in zip(loaded, groups, strict=True)
            ]
        return {
            paths: dataclasses.replace(
                scan.of_files([facts for _, facts in images]),
                pictures=tuple(picture for picture, _ in images) if self._plan.needs_pictures else (),
            )
            for paths, scan, images in zip(groups, scans, loaded, strict=True)
        }


def visual_bytes(scan: Scan) -> int:
    """Number of bytes of a scan's visual tokens."""
    return sum(t.nbytes for visual in scan.visuals for t in visual.tensors)
