"""The embedding cache: what is read is what the encoder says, or a refusal that names the part or shard."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vitos.scans.cache
from vitos.core.geometry import Rect, TokenGrid, View
from vitos.core.prompt import VisualTokens
from vitos.data.images import load_image
from vitos.policy.branches import Branches
from vitos.policy.vlm import SparseVLM
from vitos.scans import build as cache_build
from vitos.scans.build import build_cache
from vitos.scans.cache import CacheError, EmbeddingCache, differences, fingerprint, image_key, write_shard
from vitos.scans.store import ScanStore

SCAN_BYTES = 64 * 128 * 4  # 64 visual tokens of width 128 in float32


@pytest.fixture
def images(phantom_records):
    return [record.image_paths[0] for record in phantom_records]


@pytest.fixture
def built(warm_policy, images, tmp_path):
    """A cache of all eight images in four shards."""
    build_cache(warm_policy, images, tmp_path / "cache", shard_bytes=2 * SCAN_BYTES)
    return tmp_path / "cache"


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def assert_whole(folder, policy, images):
    cache = EmbeddingCache.open(folder, policy.backbone)
    for path in images:
        expected, found = policy.encode(path).visuals[0], cache.get(load_image(path))
        assert torch.equal(found.embeddings, expected.embeddings)
        assert (found.grid, found.resized, found.streams) == (expected.grid, expected.resized, ())


@pytest.fixture
def encoded(monkeypatch):
    """The images that the encoder gets, as they come."""
    seen, encode = [], Branches.encode
    monkeypatch.setattr(Branches, "encode", lambda self, images: seen.extend(images) or encode(self, images))
    return seen


def test_what_is_read_is_what_the_encoder_says(built, warm_policy, images, phantom_records, encoded):
    assert len(shards(built)) == 4
    assert_whole(built, warm_policy, images)
    plain = ScanStore(warm_policy).get(phantom_records)
    encoded.clear()
    cached = ScanStore(warm_policy, cache=EmbeddingCache.open(built, warm_policy.backbone)).get(phantom_records)
    assert encoded == []
    for a, b in zip(plain, cached, strict=True):
        assert torch.equal(a.visuals[0].embeddings, b.visuals[0].embeddings)
        assert a.images == b.images


def test_every_picture_is_encoded_once(warm_policy, images, tmp_path, encoded):
    report = build_cache(warm_policy, [*images, *images], tmp_path / "cache")
    assert len(encoded) == report.computed == len(images)


def test_tokens_do_not_depend_on_the_batch(warm_policy, images):
    pictures = [load_image(path) for path in images]
    together = warm_policy.branches.encode_many([[p] for p in pictures])
    for picture, scan in zip(pictures, together, strict=True):
        alone = warm_policy.branches.encode_many([[picture]])[0]
        assert torch.equal(alone.visuals[0].embeddings, scan.visuals[0].embeddings)


def test_the_same_picture_is_stored_once(warm_policy, images, tmp_path):
    copy = tmp_path / "copy.png"
    load_image(images[0]).save(copy)
    report = build_cache(warm_policy, [images[0], copy, images[1]], tmp_path / "cache")
    assert (report.files, report.images, report.computed, report.tokens) == (3, 2, 2, 128)
    assert len(EmbeddingCache.open(tmp_path / "cache", warm_policy.backbone)) == 2


def test_pixels_and_size_name_an_image():
    pixels = np.arange(24, dtype=np.uint8)
    wide, tall = (Image.fromarray(pixels.reshape(shape)) for shape in ((2, 4, 3), (4, 2, 3)))
    assert image_key(wide) != image_key(tall)
    assert image_key(wide) == image_key(wide.copy())
    other = pixels.copy()
    other[7] += 1
    assert image_key(Image.fromarray(other.reshape(2, 4, 3))) != image_key(wide)


def test_a_changed_or_unknown_image_is_refused(built, warm_policy, images):
    picture = load_image(images[0])
    picture.putpixel((5, 5), (1, 2, 3))
    with pytest.raises(CacheError, match=r"scan\.png is not in the cache .*vitos data cache"):
        EmbeddingCache.open(built, warm_policy.backbone).get(picture, "scan.png")


def test_several_views_and_streams(warm_policy, tmp_path):
    grid = TokenGrid((View(Rect(-0.1, 0, 1, 1.3), 2, 3), View(Rect(0.1, 0.2, 1 / 3, 0.4), 1, 2)))
    make = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 5, generator=make) for _ in range(3)]
    picture = Image.new("RGB", (4, 4))
    build_cache(warm_policy, [], tmp_path / "cache")
    write_shard(
        tmp_path / "cache",
        {image_key(picture): VisualTokens(tensors[0], grid, resized=(28, 56), streams=tuple(tensors[1:]))},
        torch.float32,
    )
    found = EmbeddingCache.open(tmp_path / "cache", warm_policy.backbone).get(picture)
    assert (found.grid, found.resized) == (grid, (28, 56))
    assert all(torch.equal(a, b) for a, b in zip((found.embeddings, *found.streams), tensors, strict=True))


def test_bfloat16_is_rounded_once_and_given_back_in_the_models_format(warm_policy, images, tmp_path):
    report = build_cache(warm_policy, images, tmp_path / "cache", "bfloat16")
    assert report.dtype == "bfloat16"
    found = EmbeddingCache.open(tmp_path / "cache", warm_policy.backbone).get(load_image(images[0]))
    assert torch.equal(found.embeddings, warm_policy.encode(images[0]).visuals[0].embeddings.bfloat16().float())
    with pytest.raises(CacheError, match="holds bfloat16, not float32"):
        build_cache(warm_policy, images, tmp_path / "cache", "float32")
    with pytest.raises(CacheError, match="'int8' is not known"):
        build_cache(warm_policy, images, tmp_path / "other", "int8")


# --- whose cache ----------------------------------------------------------------------------------------------------


def change_weights(backbone, monkeypatch):
    parameter = next(backbone.vision_modules[0].parameters())
    with torch.no_grad():
        parameter.view(-1)[3] += 1e-3


def change_limits(backbone, monkeypatch):
    backbone.image_processor.size["longest_edge"] //= 2


def change_mean(backbone, monkeypatch):
    backbone.image_processor.image_mean = (0.3, 0.3, 0.4)


def change_version(backbone, monkeypatch):
    monkeypatch.setattr(vitos.scans.cache, "__version__", "99.0")


def change_attention(backbone, monkeypatch):
    backbone.model.config._attn_implementation = "eager"


def change_feature_layer(backbone, monkeypatch):
    backbone.model.config.vision_feature_layer = -2  # LLaVA keeps it outside of the encoder's settings


def change_settings(backbone, monkeypatch):
    backbone.model.config.vision_config.fullatt_block_indexes = [0]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (change_weights, ["encoder weights"]),
        (change_limits, ["image processor", "pixel limits and patches, max_pixels: 65536 in the cache, 32768 here"]),
        (change_mean, ["image processor"]),
        (change_version, ["library versions, vitos: .* in the cache, 99.0 here"]),
        (change_attention, ["attention: sdpa in the cache, eager here"]),
        (change_settings, ["encoder settings"]),
        (change_feature_layer, ["encoder settings"]),
    ],
)
def test_a_cache_of_something_else_is_refused_with_the_part(
    built, warm_policy, clone_policy, monkeypatch, change, parts
):
    import copy

    other = clone_policy(warm_policy)
    other.backbone.image_processor = copy.deepcopy(other.backbone.image_processor)
    EmbeddingCache.open(built, other.backbone)
    change(other.backbone, monkeypatch)
    with pytest.raises(CacheError, match=r".*\n *".join(parts)) as caught:
        EmbeddingCache.open(built, other.backbone)
    assert len(str(caught.value).splitlines()) == 2 + len(parts)  # these parts and no others
    with pytest.raises(CacheError, match=parts[0]):
        build_cache(other, [], built)


def test_language_weights_do_not_matter_and_saving_changes_nothing(built, warm_policy, clone_policy, tmp_path):
    trained = clone_policy(warm_policy)
    with torch.no_grad():
        trained.backbone.model.lm_head.weight += 0.1
    EmbeddingCache.open(built, trained.backbone)
    trained.save_pretrained(tmp_path / "model")
    loaded = SparseVLM.from_pretrained(tmp_path / "model", device="cpu")
    assert differences(fingerprint(trained.backbone), fingerprint(loaded.backbone)) == []


def test_folders_that_are_no_cache(warm_policy, images, tmp_path):
    with pytest.raises(CacheError, match="holds no embedding cache"):
        EmbeddingCache.open(tmp_path, warm_policy.backbone)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(CacheError, match="neither a cache nor an empty folder"):
        build_cache(warm_policy, images, tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("where", ["first byte of the header", "header", "first tensor", "last byte"])
def test_a_flipped_bit_is_refused_by_the_shards_name_and_mended(built, warm_policy, images, where):
    shard = shards(built)[2]
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    position = {"first byte of the header": 0, "header": 20, "first tensor": 8 + header, "last byte": -1}[where]
    flip(shard, position)
    cache = EmbeddingCache.open(built, warm_policy.backbone)
    refused = []
    for path in images:
        expected = warm_policy.encode(path).visuals[0].embeddings
        try:
            assert torch.equal(cache.get(load_image(path)).embeddings, expected)
        except CacheError as error:
            refused.append(str(error))
    assert refused
    assert all(f"{shard.name} is damaged" in text and "vitos data cache" in text for text in refused)
    report = build_cache(warm_policy, images, built, shard_bytes=2 * SCAN_BYTES)
    assert report.dropped == (shard.stem,)
    assert report.computed == 2
    assert_whole(built, warm_policy, images)


def test_a_changed_index_is_refused(built, warm_policy, images):
    path = sorted(built.glob("shard-*.json"))[0]
    data = json.loads(path.read_text())
    key, row = next(iter(data["images"].items()))
    row["views"][0][0] = 0.125  # parses, but boxes would shift
    path.write_text(json.dumps(data))
    cache = EmbeddingCache.open(built, warm_policy.backbone)
    picture = next(p for p in map(load_image, images) if image_key(p) == key)
    with pytest.raises(CacheError, match="checksum"):
        cache.get(picture)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CacheError, match=rf"{path.name} is damaged"):
        EmbeddingCache.open(built, warm_policy.backbone)
    build_cache(warm_policy, images, built)
    assert_whole(built, warm_policy, images)


def test_a_short_or_missing_shard_is_seen_at_once(built, warm_policy, images):
    shard = shards(built)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged"):
        EmbeddingCache.open(built, warm_policy.backbone)
    shard.unlink()
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged"):
        EmbeddingCache.open(built, warm_policy.backbone)
    build_cache(warm_policy, images, built)
    assert_whole(built, warm_policy, images)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(1, 8))
def test_interrupted_building_goes_on(warm_policy, images, tmp_path, after):
    folder = tmp_path / "cache"

    def stop(done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(warm_policy, images, folder, progress=stop, shard_bytes=2 * SCAN_BYTES)
    assert len(EmbeddingCache.open(folder, warm_policy.backbone)) == after // 2 * 2
    (folder / ".shard-x.0123.tmp.safetensors").write_text("of a kill")
    (folder / "shard-y.safetensors").write_text("killed before its JSON")
    report = build_cache(warm_policy, images, folder, shard_bytes=2 * SCAN_BYTES)
    assert report.computed == 8 - after // 2 * 2
    assert len(shards(folder)) == 4
    assert sorted(p.suffix for p in folder.iterdir()) == [".json"] * 5 + [".safetensors"] * 4
    assert_whole(folder, warm_policy, images)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("nth", range(1, 8))
def test_a_disk_that_fills_up_leaves_only_what_is_right(warm_policy, images, tmp_path, monkeypatch, call, nth):
    folder, calls, real = tmp_path / "cache", [], getattr(os, call)

    def full(*args):
        calls.append(args)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CacheError, match=r"could not be written .*No space left.*to go on"):
            build_cache(warm_policy, images, folder, shard_bytes=2 * SCAN_BYTES)
    if (folder / "cache.json").is_file():
        cache = EmbeddingCache.open(folder, warm_policy.backbone)
        for path in images:
            try:
                found = cache.get(load_image(path))
            except CacheError as error:
                assert "is not in the cache" in str(error)  # noqa: PT017  # absent, never wrong
            else:
                assert torch.equal(found.embeddings, warm_policy.encode(path).visuals[0].embeddings)
    build_cache(warm_policy, images, folder, shard_bytes=2 * SCAN_BYTES)
    assert_whole(folder, warm_policy, images)


def test_a_write_that_fails_half_way(warm_policy, images, tmp_path):
    """A real failing write: files may not grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CacheError, match="could not be written"):
            build_cache(warm_policy, images, tmp_path / "cache", shard_bytes=3 * SCAN_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]
    build_cache(warm_policy, images, tmp_path / "cache")
    assert_whole(tmp_path / "cache", warm_policy, images)


def test_the_size_is_asked_about_and_compared_with_the_disk(warm_policy, images, tmp_path, monkeypatch):
    """A large data set: 16 k images of 729 tokens of width 3584 in bfloat16 are 78 GiB."""
    many = images * 2000
    large = VisualTokens(torch.empty(729, 3584, device="meta"), TokenGrid.single(27, 27), resized=(756, 756))
    branches = SimpleNamespace(encode=lambda images: [large] * len(images))
    policy = SimpleNamespace(backbone=warm_policy.backbone, branches=branches)
    free = [200 << 30]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[0]))
    with pytest.raises(CacheError, match=r"16000 images make about 77\.9 GiB .*4\.98 MiB each.*confirm with --yes"):
        build_cache(policy, many, tmp_path / "cache", "bfloat16")
    free[0] = 70 << 30
    with pytest.raises(CacheError, match=r"77\.9 GiB .*70\.0 GiB free\. Name a folder on a larger disk"):
        build_cache(policy, many, tmp_path / "cache", "bfloat16", confirm=lambda text: True)
    assert not (tmp_path / "cache").exists()


def test_a_confirmed_size_is_built(warm_policy, images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "ASK_ABOVE", 8 * SCAN_BYTES - 1)
    asked = []
    build_cache(warm_policy, images, tmp_path / "cache", confirm=lambda text: asked.append(text) or True)
    assert len(asked) == 1
    assert_whole(tmp_path / "cache", warm_policy, images)


def read_all(arguments):
    """In a separate process: digests of all tokens, read in another order."""
    folder, model, images, seed = arguments
    torch.set_num_threads(1)
    cache = EmbeddingCache.open(folder, SparseVLM.from_pretrained(model, device="cpu").backbone)
    order = np.random.default_rng(seed).permutation(len(images))
    return {i: float(cache.get(load_image(images[i])).embeddings.double().sum()) for i in order}


def test_readers_in_parallel(warm_policy, images, tmp_path):
    warm_policy.save_pretrained(tmp_path / "model")
    build_cache(warm_policy, images, tmp_path / "cache", shard_bytes=2 * SCAN_BYTES)
    expected = {i: float(warm_policy.encode(p).visuals[0].embeddings.double().sum()) for i, p in enumerate(images)}
    jobs = [(tmp_path / "cache", tmp_path / "model", images, seed) for seed in range(2)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_all, jobs) == [expected] * 2


def test_several_images_of_a_record(built, warm_policy, phantom_records):
    paths = tuple(record.image_paths[0] for record in phantom_records[:2])
    cache = EmbeddingCache.open(built, warm_policy.backbone)
    (scan,) = ScanStore(warm_policy, cache=cache).get([replace(phantom_records[0], image_paths=paths)])
    assert len(scan.visuals) == len(scan.images) == 2
    for path, visual in zip(paths, scan.visuals, strict=True):
        assert torch.equal(visual.embeddings, warm_policy.encode(path).visuals[0].embeddings)
