"""Phantoms of several images: answers agree with the scenes, texts give nothing away, files read back as drawn."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vitos.data.images import load_image
from vitos.data.phantom import render
from vitos.data.phantom_volumes import CHANGES, found_in, make_volume, stack_samples, write_volumes
from vitos.data.readers import read_records


def drawn(template, count=60, split="train"):
    return [(stack, q) for _, stack, q in stack_samples(split, count, templates=[template])]


def test_answers_are_those_of_the_scenes():
    for stack, question in drawn("largest_slice"):
        kind = question.text.split(" is the ")[1].removesuffix(" largest?")
        cuts = found_in(stack)[kind]
        assert int(question.truth) == max(cuts, key=lambda cut: cut[0].radius)[1]
        assert {box.image for box in question.boxes} == {place for _, place in cuts}
        assert 2 <= len(cuts) <= 3
        assert len(set(question.options)) == 4
    for stack, question in drawn("kind_in_slice"):
        place = int(question.text.rpartition(" ")[2].removesuffix("?"))
        assert [lesion.kind for lesion in stack[place - 1].findings] == [question.truth]
    for stack, question in drawn("kind_in_volume"):
        assert list(found_in(stack)) == [question.truth]
        assert {box.image for box in question.boxes} == {i for i, s in enumerate(stack, start=1) if s.findings}
    for stack, question in drawn("growth"):
        before, after = (scene.findings[0].radius for scene in stack)
        assert question.truth == CHANGES[0 if after > before else 1 if after < before else 2]


@pytest.mark.parametrize(
    ("template", "options"), [("largest_slice", 4), ("kind_in_slice", 4), ("growth", 3), ("kind_in_volume", 4)]
)
def test_letters_give_nothing_away(template, options):
    letters = Counter(question.answer for _, question in drawn(template, 240))
    assert len(letters) == options
    assert max(letters.values()) < 240 / options + 5 * (240 / options) ** 0.5


def test_most_slices_show_nothing():
    rng = np.random.default_rng(0)
    shares = [np.mean([bool(scene.findings) for scene in make_volume(rng)]) for _ in range(50)]
    assert 0.2 < np.mean(shares) < 0.7


def test_the_shortest_volumes_have_room_for_their_findings():
    assert all(len(stack) in (2, 4) for _, stack, _ in stack_samples("val", 30, slices=4))


def test_splits_and_seeds_share_no_scene():
    seeds = [
        scene.texture_seed
        for split, seed in (("train", 0), ("train", 1), ("val", 0), ("test", 0))
        for _, stack, _ in stack_samples(split, 6, seed)
        for scene in stack
    ]
    assert len(set(seeds)) == len(seeds)


def test_files_are_read_as_they_were_drawn(tmp_path):
    records = read_records(write_volumes(tmp_path, "val", 3, slices=5, size=64))
    for record, (ident, stack, question) in zip(records, stack_samples("val", 3, slices=5), strict=True):
        assert record.id == ident
        assert record.boxes == question.boxes
        assert record.question == question.full_text(len(stack))
        assert record.options[record.answer] == question.truth
        for path, scene in zip(record.image_paths, stack, strict=True):
            expected = render(scene, 64)
            assert isinstance(expected, Image.Image)
            assert (np.asarray(load_image(path)) == np.asarray(expected)).all()
    with pytest.raises(FileExistsError, match="is there already"):
        write_volumes(tmp_path, "val", 3)


@pytest.mark.parametrize("wrong", [{"split": "all"}, {"seed": 1000}, {"slices": 3}, {"templates": ["x"]}])
def test_wrong_settings(wrong):
    settings = {"split": "val", "count": 1} | wrong
    with pytest.raises(ValueError, match=r"splits are|volumes take"):
        next(stack_samples(settings.pop("split"), settings.pop("count"), **settings))
