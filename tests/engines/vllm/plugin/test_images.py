"""The store of encoded images drops the least recently used first, and never confuses two images."""

import torch

from vitos.engines.vllm.plugin.images import EncodedImages, content_key


def key(number):
    return content_key(torch.tensor([number]))


def test_an_image_is_encoded_once_while_it_is_held():
    store, made = EncodedImages(2), []

    def encode(number):
        return store.get(key(number), lambda: made.append(number) or torch.full((3, 2), float(number)))

    assert [float(encode(n)[0, 0]) for n in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]  # 3 pushed 2 out, not 1, which was asked for in between
    assert (store.encoded, store.reused) == (4, 2)
    store.clear()
    encode(1)
    assert made[-1] == 1


def test_what_is_held_is_no_longer_the_callers():
    store = EncodedImages(1)
    first = store.get(key(1), lambda: torch.ones(2, 2))
    first.zero_()
    assert torch.equal(store.get(key(1), lambda: torch.zeros(2, 2)), torch.ones(2, 2))


def test_without_room_nothing_is_held():
    store = EncodedImages(0)
    for _ in range(2):
        store.get(key(1), lambda: torch.ones(1, 1))
    assert (store.encoded, store.reused) == (2, 0)


def test_keys_tell_values_shapes_and_formats_apart():
    patches = torch.arange(6.0)
    variants = [
        (patches, torch.tensor([1, 2, 3])),
        (patches, torch.tensor([1, 3, 2])),
        (patches.view(2, 3), torch.tensor([1, 2, 3])),
        (patches.double(), torch.tensor([1, 2, 3])),
        (patches + 1e-6, torch.tensor([1, 2, 3])),
    ]
    keys = {tuple(content_key(*parts).tolist()) for parts in variants}
    assert len(keys) == len(variants)
    assert torch.equal(content_key(patches), content_key(patches.clone()))
    assert torch.equal(content_key(patches.bfloat16()), content_key(patches.bfloat16()))
