"""Evidence in several images: numbers in the prompt, parsing, matching and masks, each against brute force."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import Box, TokenGrid, matched_iou
from vitos.core.masks import centre_mask, fit_budget, inverted_mask, padding, random_mask, shifted_mask
from vitos.core.numbering import image_numbers, numbered
from vitos.core.response import format_box_list, format_localization, parse_localization, read_normalized
from vitos.core.sparsify import KeepRule, select

ONE, TWO = Box(0.1, 0.2, 0.3, 0.4), Box(0.5, 0.5, 1.0, 1.0)

grids = st.lists(st.builds(TokenGrid.single, st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=4)
boxes = st.tuples(
    st.integers(0, 18), st.integers(0, 18), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4)
).map(lambda v: Box(v[0] / 20, v[1] / 20, min(v[0] + v[2], 20) / 20, min(v[1] + v[3], 20) / 20, v[4]))


def inside(found, parts):
    return [box for box in found if box.image <= len(parts)]


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "shown", "numbers"),
    [
        ("<image>What is it?", "<image>What is it?", (1,)),
        ("What is it?", "What is it?", ()),
        ("Slice 7: <image>\nWhat?", "Slice 7: <image>\nWhat?", (7,)),
        ("7<image><image>", "7 Image 1: <image>\nImage 2: <image>", (1, 2)),
        ("<image> or <image>?", "Image 1: <image> or Image 2: <image>\n?", (1, 2)),
        ("Slice 4: <image>\nSlice 9: <image>\nQ", "Slice 4: <image>\nSlice 9: <image>\nQ", (4, 9)),
        ("Figure 2:<image> Figure 1: <image> Q", "Figure 2:<image> Figure 1: <image> Q", (2, 1)),
        # Not all have a number, two have the same, or it is no whole number from 1: the prompt counts by itself.
        ("Slice 4: <image> <image> Q", "Slice 4: Image 1: <image> Image 2: <image> Q", (1, 2)),
        ("Slice 4: <image> Slice 4: <image> Q", "Slice 4: Image 1: <image> Slice 4: Image 2: <image> Q", (1, 2)),
        ("At 0: <image> At 1: <image> Q", "At 0: Image 1: <image> At 1: Image 2: <image> Q", (1, 2)),
    ],
)
def test_numbers_are_those_of_the_text(question, shown, numbers):
    assert numbered(question) == shown
    assert image_numbers(question) == numbers


@given(st.lists(st.sampled_from(["<image>", "Slice 3: ", "Image 1: ", " ", "\n", "x", "7"]), max_size=12).map("".join))
def test_numbering_twice_is_numbering_once(question):
    once = numbered(question)
    assert numbered(once) == once
    assert image_numbers(once) == image_numbers(question)
    assert once.count("<image>") == question.count("<image>") == len(image_numbers(question))


# --- parsing --------------------------------------------------------------------------------------------------------

READERS = {4: (1, read_normalized), 9: (2, read_normalized), 12: (3, read_normalized)}


def localized(evidence):
    return parse_localization(f"<think>t</think><evidence>{evidence}</evidence><answer>A</answer>", None, READERS)


def test_boxes_are_read_in_the_image_that_their_number_names():
    found = localized("[[9, 0.10, 0.20, 0.30, 0.40], [4, 0.5, 0.5, 1, 1], [9, 0, 0, 1, 1]]")
    assert found.boxes == (Box(0.1, 0.2, 0.3, 0.4, 2), Box(0.5, 0.5, 1, 1, 1), Box(0, 0, 1, 1, 2))
    assert found.well_formed
    single = localized("[12, 0, 0, 1, 1]")
    assert single.boxes == (Box(0, 0, 1, 1, 3),)
    assert not single.well_formed


@pytest.mark.parametrize(
    "evidence",
    [
        "[[0.10, 0.20, 0.30, 0.40]]",  # no number
        "[[5, 0.1, 0.2, 0.3, 0.4]]",  # no such image
        "[[4, 0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]",
        "[[4.0, 0.1, 0.2, 0.3, 0.4]]",
        "[[04, 0.1, 0.2, 0.3, 0.4]]",
        "[[-4, 0.1, 0.2, 0.3, 0.4]]",
        "[[0, 0.1, 0.2, 0.3, 0.4]]",
        "[[4, 0.3, 0.2, 0.1, 0.4]]",
        "[[4, 0.1, 0.2, 0.3, 1.4]]",
        "[[4, 0.1, 0.2, 0.3, 0.4, 0.5]]",
        "[[Slice 4, 0.1, 0.2, 0.3, 0.4]]",
        "[" + ", ".join(["[4, 0.1, 0.1, 0.2, 0.2]"] * 97) + "]",
    ],
)
def test_one_bad_box_and_there_are_none(evidence):
    assert localized(evidence).boxes == ()
    assert not localized(evidence).well_formed


def test_a_number_is_no_evidence_in_a_prompt_of_one_image():
    text = "<think>t</think><evidence>[[1, 0.1, 0.2, 0.3, 0.4]]</evidence><answer>A</answer>"
    assert parse_localization(text).boxes == ()


@given(st.text(alphabet="[]0123456789., -eSlice\n<>/viden", max_size=60))
def test_parsing_is_total_and_agrees_with_json(text):
    found = localized(text).boxes
    try:
        rows = json.loads(text)
    except ValueError:
        rows = None
    if rows is None:
        assert found == ()
    for box in found:
        assert 1 <= box.image <= 3


@given(st.lists(st.tuples(st.sampled_from(sorted(READERS)), boxes), min_size=1, max_size=6))
def test_what_is_written_is_read_back(pairs):
    rows = [[str(number), *(f"{v:.2f}" for v in box.as_tuple())] for number, box in pairs]
    text = format_localization("t", format_box_list(rows), "A")
    read = parse_localization(text, None, READERS).boxes
    assert read == tuple(Box(*box.as_tuple(), READERS[number][0]) for number, box in pairs)


def test_rows_with_and_without_a_number_do_not_mix():
    with pytest.raises(ValueError, match="number in front in every box"):
        format_box_list([["1", "0.1", "0.2", "0.3", "0.4"], ["0.1", "0.2", "0.3", "0.4"]])


# --- matching -------------------------------------------------------------------------------------------------------


@given(st.lists(boxes, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_matching_is_the_best_of_all_pairings_within_an_image(predicted, gold):
    def overlap(a, b):
        return Box(*a.as_tuple()).iou(Box(*b.as_tuple())) if a.image == b.image else 0.0

    short, long = sorted((predicted, gold), key=len)
    best = max(
        sum(overlap(a, b) for a, b in zip(short, order, strict=True))
        for order in itertools.permutations(long, len(short))
    )
    assert matched_iou(predicted, gold) == pytest.approx(best / len(long), abs=1e-12)


def test_the_right_place_in_the_wrong_image_earns_nothing():
    assert matched_iou([Box(0, 0, 0.5, 0.5, 2)], [Box(0, 0, 0.5, 0.5, 3)]) == 0
    assert matched_iou([Box(0, 0, 0.5, 0.5, 3)], [Box(0, 0, 0.5, 0.5, 3)]) == 1


# --- masks ----------------------------------------------------------------------------------------------------------


@given(grids, st.lists(boxes, min_size=1, max_size=4), st.integers(0, 2), st.integers(1, 3), st.integers(0, 2))
def test_each_image_keeps_tokens_by_its_own_boxes(parts, found, margin, least, elsewhere):
    found = inside(found, parts)
    rule = KeepRule(margin, least, elsewhere)
    kept = select(TokenGrid.joined(parts), found, rule)
    if not found:
        assert kept.fallback
        assert kept.all
        return
    assert len(kept.images) == len(parts)
    for place, (part, one) in enumerate(zip(parts, kept.images, strict=True), start=1):
        own = [Box(*box.as_tuple()) for box in found if box.image == place]
        if own:
            assert (one.mask == select(part, own, rule).mask).all()
        else:
            count = min(elsewhere, part.num_tokens)
            assert (one.mask == (centre_mask(part, count) if count else np.zeros(part.num_tokens, dtype=bool))).all()


@given(grids, st.lists(boxes, min_size=1, max_size=3), st.data())
def test_one_budget_for_all_images_is_met_exactly(parts, found, data):
    found = inside(found, parts) or [ONE]
    grid = TokenGrid.joined(parts)
    count = data.draw(st.integers(1, grid.num_tokens))
    rng = np.random.default_rng(0)
    masks = [random_mask(grid, count, rng), centre_mask(grid, count), fit_budget(grid, found, count)]
    masks.append(shifted_mask(grid, found, rng, count=count))
    if count < grid.num_tokens:
        masks.append(~inverted_mask(grid, masks[0], rng, count=grid.num_tokens - count))
    for mask in masks:
        assert mask.shape == (grid.num_tokens,)
        assert mask.sum() == count


@given(grids, st.lists(boxes, min_size=1, max_size=3), st.data())
def test_a_budget_takes_evidence_first_and_nothing_from_images_without_it_before_the_last(parts, found, data):
    found = inside(found, parts) or [ONE]
    grid = TokenGrid.joined(parts)
    count = data.draw(st.integers(1, grid.num_tokens))
    mask = fit_budget(grid, found, count)
    # Brute force: rank each token by (outside the boxes, padding, distance in its own image), then by its index.
    ranks, index = [], 0
    for place, part in enumerate(parts, start=1):
        own = [box for box in found if box.image == place]
        hit, pad = part.overlapping(own), padding(part)
        for token, (x, y) in enumerate(part.centres()):
            to_box = [np.hypot(max(b.x1 - x, x - b.x2, 0), max(b.y1 - y, y - b.y2, 0)) for b in own]  # 0 inside a box
            to_middle = [np.hypot((b.x1 + b.x2) / 2 - x, (b.y1 + b.y2) / 2 - y) for b in own]
            distance = min(to_middle if hit[token] else to_box, default=np.inf)
            ranks.append((not hit[token], bool(pad[token]), round(distance, 9), index))
            index += 1
    chosen = {rank[-1] for rank in sorted(ranks)[:count]}
    assert set(np.flatnonzero(mask)) == chosen


def test_the_grid_of_one_image_is_its_own_and_ignores_no_box():
    grid = TokenGrid.single(2, 2)
    assert TokenGrid.joined([grid]) is grid
    assert grid.overlapping([TWO]).tolist() == [False, False, False, True]


def test_a_box_is_stored_as_records_have_it():
    for box, stored in ((ONE, [0.1, 0.2, 0.3, 0.4]), (Box(0, 0, 1, 1, 2), {"image": 2, "box": [0, 0, 1, 1]})):
        assert box.to_json() == stored
        assert Box.from_json(json.loads(json.dumps(stored))) == box
    with pytest.raises(ValueError, match="counted from 1"):
        Box(0, 0, 1, 1, 0)


def test_split_gives_each_image_its_own_values():
    grid = TokenGrid.joined([TokenGrid.single(1, 2), TokenGrid.single(1, 3), TokenGrid.single(2, 2)])
    assert [part.tolist() for part in grid.split(np.arange(9))] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    assert torch.tensor(grid.overlapping([Box(0, 0, 1, 1, 2)])).nonzero()[:, 0].tolist() == [2, 3, 4]
