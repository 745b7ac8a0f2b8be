"""What only InternVL has: the tiles of an image and the parts that they cover; see test_invariants.py too."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.backbones.family import library_inputs, library_run
from tests.backbones.family_internvl import internvl, internvl_processor

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect
from vitos.core.prompt import pad_prompts
from vitos.core.sparsify import Fusion, select


@pytest.fixture(scope="module")
def backbone():
    return internvl()


def encode(backbone, images):
    with torch.no_grad():
        return backbone.encode(images)


def rects(visual):
    return [view.rect for view in visual.grid.views]


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((448, 224), (2, 1)), ((100, 301), (1, 3)), ((460, 690), (2, 3)), ((50, 2000), (1, 12)), ((2000, 50), (12, 1))],
)
def test_tiles_by_hand(backbone, picture, size, tiles):
    """Rows of tiles from the top left, then the thumbnail."""
    cols, rows = tiles
    (visual,) = encode(backbone, [picture(*size)])
    expected = [Rect(c / cols, r / rows, (c + 1) / cols, (r + 1) / rows) for r in range(rows) for c in range(cols)]
    assert rects(visual) == [*expected, WHOLE_IMAGE]
    assert visual.resized == (224 * cols, 224 * rows)


def test_one_tile_needs_no_thumbnail(backbone, picture):
    (visual,) = encode(backbone, [picture(200, 210)])
    assert rects(visual) == [WHOLE_IMAGE]


def test_tiles_can_be_turned_off_and_only_so(backbone, picture):
    """The published image processors have `crop_to_patches: false`, which the library's processor overrides."""
    assert backbone.image_processor.crop_to_patches is False
    single = internvl(max_patches=1)
    (visual,) = encode(single, [picture(448, 224)])
    assert rects(visual) == [WHOLE_IMAGE]
    assert visual.resized == (224, 224)
    assert single.geometry != backbone.geometry


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=200)
def test_there_are_as_many_views_as_the_library_cuts(backbone, width, height):
    image = Image.new("1", (width, height))
    cols, rows = backbone._tiles(image)
    views = cols * rows + (cols * rows > 1)
    given = {"crop_to_patches": True}
    assert views == backbone.image_processor.get_number_of_image_patches(height, width, given) <= 13


def test_a_box_on_a_seam_keeps_tokens_of_both_tiles_and_the_thumbnail(backbone, picture):
    (visual,) = encode(backbone, [picture(460, 690)])
    mask = select(visual.grid, [Box(0.45, 0.40, 0.55, 0.60)]).mask.reshape(7, 8, 8)
    assert mask.any((1, 2)).tolist() == [False, False, True, True, False, False, True]
    assert mask[2].any(0).nonzero()[0].tolist() == [7]  # 0.9 to 1 of the left tile's 8 columns
    assert mask[3].any(0).nonzero()[0].tolist() == [0]
    assert mask[2].any(1).nonzero()[0].tolist() == [1, 2, 3, 4, 5, 6]  # 0.2 to 0.8 of its rows
    assert mask[6].any(0).nonzero()[0].tolist() == [3, 4]


def test_extreme_shape_and_full_tiles_are_the_unmodified_model(picture):
    """448 px and 256 tokens per tile: dense and sparse, two images with different numbers of tiles."""
    full, text = internvl(side=448), "See <image> or <image> now?"
    images = [picture(900, 448), picture(300, 310)]
    visuals = encode(full, images)
    assert [v.grid.num_tokens for v in visuals] == [768, 256]
    masks = [torch.from_numpy(select(v.grid, [Box(0.3, 0.2, 0.6, 0.5)]).mask) for v in visuals]
    dense = full.build_prompt(text, visuals)
    keep = torch.ones(len(dense), dtype=torch.bool)
    keep[dense.is_visual] = torch.cat(masks)
    inputs = library_inputs(internvl_processor(full), text, images)
    hidden = {"attention_mask": keep[None].long(), "position_ids": torch.arange(len(dense))[None]}
    for prompt, changes, rows in (
        (dense, {}, torch.ones_like(keep)),
        (dense.sparse(masks, Fusion("none")), hidden, keep),
    ):
        with torch.no_grad():
            logits = full.model(**full.model_inputs(pad_prompts([prompt], 0))).logits[0]
        expected, _ = library_run(full, inputs | changes)
        torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-6)


def test_tile_and_thumbnail_show_what_their_rectangles_say(backbone):
    """Without the encoder: a white corner of a black image is in exactly those cells of the views that cover it."""
    pixels = np.zeros((448, 448 * 2, 3), dtype=np.uint8)
    pixels[:56, 840:] = 255  # the top right eighth of the last tile's height and width
    image = Image.fromarray(pixels)
    (visual,) = encode(backbone, [image])
    (view_count,) = {len(visual.grid.views)}
    tensors = backbone.image_processor(images=[image], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    assert len(tensors) == view_count
    lit = tensors.mean(1).unfold(1, 28, 28).unfold(2, 28, 28).mean((-1, -2))  # mean of every cell, (views, 8, 8)
    lit = (lit - lit.min()) / (lit.max() - lit.min())
    mask = visual.grid.overlapping([Box(840 / 896, 0.0, 1.0, 56 / 448)]).reshape(view_count, 8, 8)
    assert np.array_equal(lit.numpy() > 0.1, mask)
