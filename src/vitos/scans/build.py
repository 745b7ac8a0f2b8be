"""Making an embedding cache: estimate, ask, then encode the missing images, shard by shard.

Whatever stops a build (Ctrl-C, a kill, a full disk, a broken image), the shards written so far stay, and the next
build goes on from them; it first reads all of them and removes the damaged ones. One build at a time per folder.
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
KEPT_FREE = 1 << 30  # bytes of the disk left free for other programs
SAMPLED = 16
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """The result of a build.

    Attributes:
        folder: the folder of the cache.
        dtype: number format of the tokens.
        files: number of image names asked for.
        images: number of distinct images in the cache.
        computed: number of images that this build encoded.
        dropped: names of damaged shards that were removed and made again.
        tokens: number of visual tokens that this build computed.
        size: number of bytes of all shards.
        seconds: duration of this build.
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
    """Compute the tokens that the cache lacks; an existing cache must have this encoder and number format.

    Args:
        policy: the policy whose encoder runs.
        images: the image files, named as in records, each once.
        folder: the folder of the cache.
        dtype: a key of `DTYPES`; None for the encoder's. A shorter format than the encoder's loses precision.
        confirm: a question to the user, called with the estimate before more than `ASK_ABOVE` bytes are written.
        progress: a function that gets the number of images done and of all images.
        shard_bytes: size at which a shard is written.

    Raises:
        CacheError: if the cache was made with something else, the disk is too small, the user does not confirm, or
            writing fails.
        ImageError: if an image cannot be read; the message names the file.
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
            f"{folder} could not be written ({error}); its shards are complete. Free space and run it again to go on"
        ) from error
    size = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    seconds = time.perf_counter() - started
    return BuildReport(
        folder=folder,
        dtype=dtype,
        files=len(images),
        images=len(done),
        computed=computed,
        dropped=dropped,
        tokens=tokens,
        size=size,
        seconds=seconds,
    )


def _prepare(policy: SparseVLM, folder: Path, dtype: str | None) -> str:
    """The number format; refuses a folder with other contents."""
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
    """The images of undamaged shards, all bytes read; damaged shards and leftovers of a kill are removed."""
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
    """Estimate the size from a few images, spread over all; refuse it if the disk is too small, ask if it is large.

    Returns:
        The tokens of the images encoded for the estimate, by image key, so that these are not encoded again.
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
