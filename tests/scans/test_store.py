"""Each distinct image is encoded once, as long as it fits."""

from dataclasses import replace

import pytest
import torch

from vitos.data.images import ImageError
from vitos.policy.branches import Branches
from vitos.scans.store import ScanStore

SCAN_BYTES = 64 * 128 * 4  # 64 visual tokens of width 128 in float32


@pytest.fixture
def encoded(monkeypatch):
    """The images that the encoder gets, as they come."""
    seen, encode = [], Branches.encode
    monkeypatch.setattr(Branches, "encode", lambda self, images: seen.extend(images) or encode(self, images))
    return seen


@pytest.fixture
def policy(warm_policy):
    return warm_policy


def test_an_image_is_encoded_once_for_all_its_questions(policy, encoded, phantom_records):
    store = ScanStore(policy)
    a, b, c = phantom_records[:3]
    other = replace(a, id="other", question="<image>Another one?")
    scans = store.get([a, other, b])
    assert scans[0] is scans[1]
    assert len(encoded) == 2
    again = store.get([c, b, a])
    assert len(encoded) == 3
    assert again[1] is scans[2]
    assert again[2] is scans[0]
    for record, scan in zip([c, b, a], again, strict=True):
        expected = policy.encode(record.image_paths[0])
        torch.testing.assert_close(scan.visuals[0].embeddings, expected.visuals[0].embeddings, atol=1e-4, rtol=1e-4)


def test_the_least_recently_used_are_dropped(policy, encoded, phantom_records):
    a, b, c = phantom_records[:3]
    store = ScanStore(policy, max_bytes=2 * SCAN_BYTES)
    for records in ([a], [b], [a], [c], [a], [b]):  # c drops b
        store.get(records)
    assert len(encoded) == 4


def test_a_store_of_nothing_still_answers(policy, encoded, phantom_records):
    store = ScanStore(policy, max_bytes=0, batch_size=2)
    assert len(store.get(phantom_records[:3])) == 3
    store.get(phantom_records[:1])
    assert len(encoded) == 4


def test_several_images_of_a_record_are_one_scan(policy, encoded, phantom_records):
    paths = tuple(record.image_paths[0] for record in phantom_records[:2])
    (scan,) = ScanStore(policy).get([replace(phantom_records[0], image_paths=paths)])
    for path, visual in zip(paths, scan.visuals, strict=True):
        torch.testing.assert_close(visual.embeddings, policy.encode(path).visuals[0].embeddings, atol=1e-4, rtol=1e-4)


def test_broken_images_are_named(policy, phantom_records, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        ScanStore(policy).get([replace(phantom_records[0], image_paths=(broken,))])
