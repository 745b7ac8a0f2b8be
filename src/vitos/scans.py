"""Visual tokens of records, each distinct image encoded once and kept in memory, or read from a cache on disk.

The encoder is frozen during reinforcement learning, so its output serves both branches, all rollouts and every epoch.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vitos.cache import EmbeddingCache
from vitos.data.images import load_image_facts
from vitos.data.record import Record
from vitos.policy import Scan, SparseVLM


class ScanStore:
    """Scans by record, least recently used ones dropped beyond a size.

    Args:
        policy: whose encoder runs; it must not change while the store is in use.
        max_bytes: of visual tokens kept; 0 keeps none.
        batch_size: images open at a time.
        cache: read from here instead of encoding; it must fit the policy (`EmbeddingCache.open` sees to it).
        keep_pictures: scans hold the images, too, for plans that look again; they do not count in `max_bytes`.
    """

    def __init__(
        self,
        policy: SparseVLM,
        max_bytes: int = 4 << 30,
        batch_size: int = 32,
        cache: EmbeddingCache | None = None,
        keep_pictures: bool = False,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._batch_size = batch_size
        self._cache = cache
        self._keep_pictures = keep_pictures
        self._scans: OrderedDict[tuple[Path, ...], Scan] = OrderedDict()
        self._bytes = 0

    def get(self, records: Sequence[Record]) -> list[Scan]:
        """The scan of every record, missing ones encoded or read now.

        Raises:
            ImageError: if an image cannot be read; it names the file.
            CacheError: if there is a cache and it lacks an image, or the shard of an image is damaged.
        """
        wanted = {record.image_paths: record for record in records}
        fresh: dict[tuple[Path, ...], Scan] = {}
        missing = [paths for paths in wanted if paths not in self._scans]
        for start in range(0, len(missing), self._batch_size):
            fresh |= self._load(missing[start : start + self._batch_size])
        found = {paths: fresh[paths] if paths in fresh else self._scans[paths] for paths in wanted}
        for paths, scan in found.items():
            self._keep(paths, scan)
        return [found[record.image_paths] for record in records]

    def _load(self, groups: Sequence[tuple[Path, ...]]) -> dict[tuple[Path, ...], Scan]:
        """Scans of several records' images."""
        loaded = [[load_image_facts(path) for path in paths] for paths in groups]
        if self._cache is None:
            scans = self._policy.encode_many([[picture for picture, _ in images] for images in loaded])
        else:
            scans = [
                Scan(tuple(self._cache.get(picture, path) for (picture, _), path in zip(images, paths, strict=True)))
                for images, paths in zip(loaded, groups, strict=True)
            ]
        return {
            paths: dataclasses.replace(
                scan.of_files([facts for _, facts in images]),
                pictures=tuple(picture for picture, _ in images) if self._keep_pictures else (),
            )
            for paths, scan, images in zip(groups, scans, loaded, strict=True)
        }

    def _keep(self, paths: tuple[Path, ...], scan: Scan) -> None:
        if paths not in self._scans:
            self._bytes += _size(scan)
        self._scans[paths] = scan
        self._scans.move_to_end(paths)
        while self._bytes > self._max_bytes:
            _, dropped = self._scans.popitem(last=False)
            self._bytes -= _size(dropped)


def _size(scan: Scan) -> int:
    return sum(t.nbytes for visual in scan.visuals for t in visual.tensors)
