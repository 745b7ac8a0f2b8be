"""Visual tokens of a frozen encoder on disk: computed once per distinct image, read by any number of processes.

A cache is a folder:

| file | contents |
| --- | --- |
| `cache.json` | the encoder and settings that the tokens were made with (`fingerprint`), and their number format |
| `shard-<id>.safetensors` | tensors `<image>/0` (visual tokens), `<image>/1` … (extra streams); read by memory map |
| `shard-<id>.json` | written after its shard: size, and for each image its grid and the checksum of its tensors |

An image is named by the SHA-256 of its size and RGB pixels as they enter the model's image processor. So the same
picture in two files is stored once, and a changed file is another image. No path and no header value is stored. A
reader ignores a shard without its JSON, and checks each read against the checksum of the image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitos.backbones import Backbone
from vitos.core.geometry import Rect, TokenGrid, View
from vitos.core.prompt import VisualTokens
from vitos.core.version import __version__
from vitos.data.files import atomic_write, write_json_atomic

FORMAT = 1
HEAD = "cache.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
REBUILD = "run the same `vitos data cache` again: it keeps undamaged shards and computes the rest"
# Settings that name an origin and do not change pixels; number formats are in the digest of the weights.
_NAMES = (
    *("image_processor_type", "processor_class", "_processor_class", "name_or_path", "_name_or_path"),
    *("transformers_version", "architectures", "torch_dtype", "dtype"),
)


class CacheError(RuntimeError):
    """A cache does not fit, is damaged or could not be written; the message names the part or shard and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One image in a shard.

    Attributes:
        grid: the cells that its tokens look at.
        resized: width and height in pixels of the image that the encoder saw.
        streams: number of extra visual streams.
        checksum: checksum of name, geometry and tensors.
    """

    grid: TokenGrid
    resized: tuple[int, int]
    streams: int
    checksum: str

    def to_json(self) -> dict[str, Any]:
        views = [[*view.rect.as_tuple(), view.rows, view.cols] for view in self.grid.views]
        return {"views": views, "resized": list(self.resized), "streams": self.streams, "checksum": self.checksum}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheEntry:
        views = tuple(View(Rect(*row[:4]), row[4], row[5]) for row in data["views"])
        width, height = data["resized"]
        return cls(
            grid=TokenGrid(views),
            resized=(width, height),
            streams=int(data["streams"]),
            checksum=str(data["checksum"]),
        )


def image_key(picture: Image.Image) -> str:
    """Name of an RGB image: SHA-256 of its size and pixels."""
    digest = hashlib.sha256(f"RGB {picture.width} x {picture.height}\n".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """Everything that the visual tokens of an image depend on, by part; if equal, tokens are equal on the same device.

    The device is not part of the fingerprint: tokens made on a GPU may be read on another machine.
    """
    config = backbone.model.config
    processor = {k: v for k, v in backbone.image_processor.to_dict().items() if k not in _NAMES}
    packages = ("torch", "transformers", "pillow")
    return {
        "format": FORMAT,
        "family": type(backbone).__name__,
        "encoder weights": _weights_digest(backbone.vision_modules),
        "encoder settings": _json_digest(_settings(config.to_dict())),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "image processor": _json_digest(processor),
        "pixel limits and patches": dataclasses.asdict(backbone.geometry),
        "library versions": {"vitos": __version__} | {name: importlib.metadata.version(name) for name in packages},
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration without the language model's part: the layer of the features, their pooling …"""
    return {
        str(key): _settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (*_NAMES, "text_config") and not str(key).endswith(("_token_id", "_token_index"))
    }


def _weights_digest(modules: Iterable[torch.nn.Module]) -> str:
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _json_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory as bytes, in any number format; without a copy if it is on the CPU."""
    octets: NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return octets.data


def differences(cached: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The differences between two fingerprints, one line per part."""
    lines = []
    for part in {**cached, **here}:
        there, now = cached.get(part), here.get(part)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            pairs = [(f"{part}, {k}", there.get(k), now.get(k)) for k in {**there, **now}]
        else:
            pairs = [(part, there, now)]
        lines += [f"{name}: {_short(a)} in the cache, {_short(b)} here" for name, a, b in pairs if a != b]
    return lines


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


class EmbeddingCache:
    """A cache opened for reading; `open` has checked that it was made with this encoder.

    To share a cache, each process opens it. Shards that are added later are not seen.
    """

    def __init__(self, folder: Path, backbone: Backbone, shards: Mapping[str, Mapping[str, CacheEntry]]) -> None:
        self._folder = folder
        self._backbone = backbone
        self._where = {key: (shard, entry) for shard, entries in shards.items() for key, entry in entries.items()}
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, backbone: Backbone) -> EmbeddingCache:
        """Open a cache; one of another encoder is refused.

        Raises:
            CacheError: if there is no cache, its files are damaged, or a part of the fingerprint differs; the message
                names the part.
        """
        folder = Path(folder)
        read_head(folder, backbone)
        return cls(folder, backbone, {shard: read_index(folder, shard) for shard in shard_names(folder)})

    def __len__(self) -> int:
        """Number of distinct images."""
        return len(self._where)

    def get(self, picture: Image.Image, name: object = "an image") -> VisualTokens:
        """The visual tokens of an RGB image, in the number format and on the device of the model.

        Args:
            picture: the image.
            name: name of the image in errors.

        Raises:
            CacheError: if the image is not in the cache, or its shard is damaged.
        """
        key = image_key(picture)
        if key not in self._where:
            raise CacheError(f"{name} is not in the cache {self._folder}, or changed since; {REBUILD}")
        shard, entry = self._where[key]
        tensors = read_entry(self._handle(shard), self._folder / f"{shard}.safetensors", key, entry)
        device, dtype = self._backbone.device, self._backbone.vision_dtype
        embeddings, *streams = (t.to(device, dtype, copy=True) for t in tensors)
        return VisualTokens(embeddings, entry.grid, resized=entry.resized, streams=tuple(streams))

    def _handle(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = open_shard(self._folder / f"{shard}.safetensors")
        return self._open[shard]


# --- files ----------------------------------------------------------------------------------------------------------


def read_head(folder: Path, backbone: Backbone) -> str:
    """The number format of a cache that fits the encoder; errors as in `EmbeddingCache.open`."""
    path = folder / HEAD
    if not path.is_file():
        raise CacheError(f"{folder} holds no embedding cache; make it with `vitos data cache … --out {folder}`")
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        cached, dtype = dict(head["fingerprint"]), str(head["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}); remove {folder} and make the cache again") from error
    if dtype not in DTYPES:
        raise CacheError(f"{path} names an unknown number format {dtype!r}; remove {folder} and make the cache again")
    if found := differences(cached, json.loads(json.dumps(fingerprint(backbone)))):
        lines = "\n  ".join(found)
        raise CacheError(
            f"{folder} was made with something else:\n  {lines}\nmake a cache for this model in another folder"
        )
    return dtype


def shard_names(folder: Path) -> list[str]:
    """Names of the shards that were written to their end."""
    return sorted(path.stem for path in folder.glob("shard-*.json"))


def read_index(folder: Path, shard: str) -> dict[str, CacheEntry]:
    """The images of a shard, whose file must have the size that it was written with.

    Raises:
        CacheError: if a file is damaged; the message names it.
    """
    path, tensors = folder / f"{shard}.json", folder / f"{shard}.safetensors"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = {key: CacheEntry.from_json(row) for key, row in data["images"].items()}
        size = int(data["bytes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}); {REBUILD}") from error
    found = tensors.stat().st_size if tensors.is_file() else 0
    if found != size:
        raise CacheError(f"{tensors} is damaged ({found} bytes of {size}); {REBUILD}")
    return entries


def open_shard(path: Path) -> Any:
    """A memory-mapped shard.

    Raises:
        CacheError: if its header is broken.
    """
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()  # open for the life of the cache
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} is damaged ({error}); {REBUILD}") from error


def read_entry(handle: Any, path: Path, key: str, entry: CacheEntry) -> list[Tensor]:
    """Visual tokens and streams of an image, as stored.

    Raises:
        CacheError: if a tensor is missing or its bytes are not those that were written.
    """
    try:
        tensors = [handle.get_tensor(f"{key}/{number}") for number in range(1 + entry.streams)]
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); {REBUILD}") from error
    if checksum(key, entry.grid, entry.resized, tensors) != entry.checksum:
        raise CacheError(f"{path} is damaged (a checksum differs); {REBUILD}")
    return tensors


def checksum(key: str, grid: TokenGrid, resized: tuple[int, int], tensors: Iterable[Tensor]) -> str:
    """Checksum of an image's name and geometry, and of its tensors' number formats, shapes and bytes."""
    digest = hashlib.blake2b(f"{key} {grid.views} {resized}\n".encode(), digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write_shard(folder: Path, images: Mapping[str, VisualTokens], dtype: torch.dtype) -> None:
    """Write one shard, first the tensors, then the JSON without which it is ignored; both appear whole or not at all.

    The name follows from the images, so two concurrent builds write different shards, or the same one twice.
    """
    from safetensors.torch import save_file

    shard = "shard-" + hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()[:16]
    tensors: dict[str, Tensor] = {}
    rows = {}
    for key, visual in images.items():
        stored = [t.detach().to("cpu", dtype).contiguous() for t in visual.tensors]
        tensors |= {f"{key}/{number}": tensor for number, tensor in enumerate(stored)}
        proof = checksum(key, visual.grid, visual.resized, stored)
        rows[key] = CacheEntry(
            grid=visual.grid, resized=visual.resized, streams=len(visual.streams), checksum=proof
        ).to_json()
    path = folder / f"{shard}.safetensors"
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
    write_json_atomic(folder / f"{shard}.json", {"bytes": path.stat().st_size, "images": rows})
