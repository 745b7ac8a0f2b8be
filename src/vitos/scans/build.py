"""Making an embedding cache: estimate, ask, then encode what is missing, shard by shard.

Whatever stops it (Ctrl-C, a kill, a full disk, a broken image), the shards written so far stand and the next run goes
on from them; it first reads all of them and drops the damaged ones. One builder at a time in a folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from vitos.core.prompt import VisualTokens
from vitos.data.files import write_json_atomic
from vitos.data.images import load_image
from vitos.policy.vlm import SparseVLM
from vitos.scans.cache import (
    DTYPES,
    HEAD,
    CacheError,
    fingerprint,
    image_key,
    open_shard,
    read_entry,
    read_head,
    read_index,
    shard_names,
    write_shard,
)

SHARD_BYTES = 256 << 20
ASK_ABOVE = 10 << 30
KEPT_FREE = 1 << 30  # of the disk, for everything else that is written meanwhile
SAMPLED = 16
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did.

    Attributes:
        files: image names asked for.
        images: distinct images now in the cache.
        computed: of these, encoded by this run.
        dropped: names of damaged shards that were removed and made again.
        tokens: visual tokens computed.
        size: bytes of all shards.
        seconds: of this run.
    """

    folder: Path
    dtype: str
    files: int
    images: int
    computed: int
    dropped: tuple[str, ...]
    tokens: int
    size: int
    seconds: float


def build_cache(
    policy: SparseVLM,
    images: Sequence[Path],
    folder: Path,
    dtype: str | None = None,
    *,
    confirm: Callable[[str], bool] = lambda text: False,
    progress: Callable[[int, int], object] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Compute what the cache lacks; an existing one must be of this encoder and number format.

    Args:
        images: as records name them, each once.
        dtype: a key of `DTYPES`; None: that of the encoder. A shorter one than the encoder's loses precision.
        confirm: asked, with the estimate, before more than `ASK_ABOVE` bytes are written.
        progress: called with (images done, images in all).

    Raises:
        CacheError: a cache of something else, too little disk, not confirmed, or a failing write.
        ImageError: if an image cannot be read; it names the file.
    """
    started = time.perf_counter()
    dtype = _prepare(policy, folder, dtype)
    done, dropped = _keep_whole_shards(folder)
    sampled = _check_room(policy, images, folder, dtype, done, confirm)
    pending: dict[str, VisualTokens] = {}
    computed = tokens = waiting = 0
    try:
        if not (folder / HEAD).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / HEAD, {"dtype": dtype, "fingerprint": fingerprint(policy.backbone)})
        for number, path in enumerate(images, start=1):
            picture = load_image(path)
            key = image_key(picture)
            if key not in done:
                pending[key] = sampled.pop(key) if key in sampled else _encode(policy, picture)
                done.add(key)
                computed += 1
                tokens += pending[key].grid.num_tokens
                waiting += _size(pending[key], dtype)
            if waiting >= shard_bytes or (pending and number == len(images)):
                write_shard(folder, pending, DTYPES[dtype])
                pending, waiting = {}, 0
            if progress is not None:
                progress(number, len(images))
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"{folder} could not be written ({error}); what is in it is whole. Free space and run it again to go on"
        ) from error
    size = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    seconds = time.perf_counter() - started
    return BuildReport(folder, dtype, len(images), len(done), computed, dropped, tokens, size, seconds)


def _prepare(policy: SparseVLM, folder: Path, dtype: str | None) -> str:
    """The number format; refuses a folder that holds something else."""
    if dtype is not None and dtype not in DTYPES:
        raise CacheError(f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}")
    if (folder / HEAD).is_file():
        there = read_head(folder, policy.backbone)
        if dtype not in (None, there):
            raise CacheError(f"{folder} holds {there}, not {dtype}; leave --dtype out or name another folder")
        return there
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CacheError(f"{folder} is neither a cache nor an empty folder; name another one")
    return dtype or str(policy.backbone.vision_dtype).removeprefix("torch.")


def _keep_whole_shards(folder: Path) -> tuple[set[str], tuple[str, ...]]:
    """Images of the shards that are whole, every byte read; damaged ones and what a kill left are removed."""
    done: set[str] = set()
    dropped = []
    for shard in shard_names(folder):
        path = folder / f"{shard}.safetensors"
        try:
            entries = read_index(folder, shard)
            handle = open_shard(path)
            for key, entry in entries.items():
                read_entry(handle, path, key, entry)
            done |= entries.keys()
        except CacheError:
            dropped.append(shard)
            (folder / f"{shard}.json").unlink()  # first: without it the shard does not exist
    whole = set(shard_names(folder))
    for path in (*folder.glob("shard-*.safetensors"), *folder.glob(".shard-*.tmp.*")):
        if path.stem not in whole:
            path.unlink()
    return done, tuple(dropped)


def _check_room(
    policy: SparseVLM,
    images: Sequence[Path],
    folder: Path,
    dtype: str,
    done: set[str],
    confirm: Callable[[str], bool],
) -> dict[str, VisualTokens]:
    """Estimate from a few images, spread over all, and compare with the free disk and with what needs no question.

    Returns:
        What was encoded for that, by image key, so that it is not encoded again.
    """
    sample = images[:: max(1, len(images) // SAMPLED)][:SAMPLED]
    encoded: dict[str, VisualTokens] = {}
    sizes = []
    for picture in map(load_image, sample):
        key = image_key(picture)
        if key not in done:
            encoded[key] = encoded.get(key) or _encode(policy, picture)
            sizes.append(_size(encoded[key], dtype))
    if not sizes:
        return encoded
    missing, each = round(len(images) * len(sizes) / len(sample)), sum(sizes) / len(sizes)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    total, free = int(missing * each), shutil.disk_usage(place).free
    text = (
        f"about {missing} images make about {total / GIB:.1f} GiB of {dtype} ({each / (1 << 20):.2f} MiB each, "
        f"measured on {len(sizes)}); the disk of {folder} has {free / GIB:.1f} GiB free."
    )
    if total > free - KEPT_FREE:
        raise CacheError(f"{text} Name a folder on a larger disk, lower model.max_pixels, or take --dtype bfloat16.")
    if total > ASK_ABOVE and not confirm(text):
        raise CacheError(f"{text} Nothing was written; confirm with --yes.")
    return encoded


def _encode(policy: SparseVLM, picture: Image.Image) -> VisualTokens:
    return policy.branches.encode([picture])[0]


def _size(visual: VisualTokens, dtype: str) -> int:
    return sum(t.numel() for t in visual.tensors) * DTYPES[dtype].itemsize
