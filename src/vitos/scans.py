"""Visual tokens of records, each distinct image encoded once and kept in memory.

The encoder is frozen during reinforcement learning, so its output serves both branches, all rollouts and every epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vitos.data.images import load_image
from vitos.data.record import Record
from vitos.policy import Scan, SparseVLM


class ScanStore:
    """Scans by record, least recently used ones dropped beyond a size.

    Args:
        policy: whose encoder runs; it must not change while the store is in use.
        max_bytes: of visual tokens kept; 0 keeps none.
        batch_size: images encoded at a time.
    """

    def __init__(self, policy: SparseVLM, max_bytes: int = 4 << 30, batch_size: int = 32) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._batch_size = batch_size
        self._scans: OrderedDict[tuple[Path, ...], Scan] = OrderedDict()
        self._bytes = 0

    def get(self, records: Sequence[Record]) -> list[Scan]:
        """The scan of every record, missing ones encoded now.

        Raises:
            ImageError: if an image cannot be read; it names the file.
        """
        wanted = {record.image_paths: record for record in records}
        fresh: dict[tuple[Path, ...], Scan] = {}
        missing = [paths for paths in wanted if paths not in self._scans]
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            images = [[load_image(path) for path in paths] for paths in part]
            fresh |= zip(part, self._policy.encode_many(images), strict=True)
        found = {paths: fresh[paths] if paths in fresh else self._scans[paths] for paths in wanted}
        for paths, scan in found.items():
            self._keep(paths, scan)
        return [found[record.image_paths] for record in records]

    def _keep(self, paths: tuple[Path, ...], scan: Scan) -> None:
        if paths not in self._scans:
            self._bytes += _size(scan)
        self._scans[paths] = scan
        self._scans.move_to_end(paths)
        while self._bytes > self._max_bytes:
            _, dropped = self._scans.popitem(last=False)
            self._bytes -= _size(dropped)


def _size(scan: Scan) -> int:
    return sum(t.nbytes for visual in scan.visuals for t in (visual.embeddings, *visual.streams))
