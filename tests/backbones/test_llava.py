"""What only LLaVA has: how an image becomes the encoder's square, and what is refused."""

import pytest
import torch
from tests.backbones.families import FAMILIES_BY_NAME

from vitos.core.geometry import Box


@pytest.fixture(scope="module")
def cropping():
    return FAMILIES_BY_NAME["llava, LLaVA-1.5"].backbone()


@pytest.fixture(scope="module")
def padding():
    return FAMILIES_BY_NAME["llava, HuatuoGPT-Vision"].backbone()


@torch.no_grad()
def grid_of(backbone, image):
    (visual,) = backbone.encode([image])
    return visual.grid


def test_padded_square_reaches_outside_the_image(padding, picture):
    (view,) = grid_of(padding, picture(200, 100)).views
    assert view.rect.as_tuple() == pytest.approx((0, -0.5, 1, 1.5))
    assert (view.rows, view.cols) == (24, 24)
    inside = grid_of(padding, picture(200, 100)).overlapping([Box(0, 0, 1, 1)]).reshape(24, 24)
    assert inside[6:18].all()
    assert not inside[:6].any()
    assert not inside[18:].any()


def test_centre_crop_sees_only_the_middle(cropping, picture):
    (view,) = grid_of(cropping, picture(400, 200)).views
    assert view.rect.as_tuple() == pytest.approx((0.25, 0, 0.75, 1))
    assert not grid_of(cropping, picture(400, 200)).overlapping([Box(0, 0, 0.2, 1)]).any()


def test_a_processor_of_another_size_is_refused(cropping):
    other = type(cropping.image_processor)(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    with pytest.raises(ValueError, match="makes 224 x 224 pixels, but the vision tower takes 336 x 336"):
        type(cropping)(cropping.model, cropping.tokenizer, other)


def test_padding_and_crop_are_part_of_the_geometry(cropping, padding):
    assert padding.geometry.rules == {"pad_to_square": True, "centre_crop": True, "resize_shortest_edge": 336}
    assert cropping.geometry.rules == padding.geometry.rules | {"pad_to_square": False}


def test_dinov2_takes_any_square_of_whole_patches(picture):
    stretching = FAMILIES_BY_NAME["llava, DINOv2"].backbone()
    (view,) = grid_of(stretching, picture(200, 100)).views
    assert (view.rows, view.cols) == (10, 10)
    assert view.rect.as_tuple() == (0, 0, 1, 1)
    assert stretching.geometry.max_pixels == 140 * 140
    for width, height in ((140, 126), (150, 150)):
        other = type(stretching.image_processor)(size={"height": height, "width": width}, do_center_crop=False)
        with pytest.raises(ValueError, match=f"makes {width} x {height} pixels, but dinov2 needs a square"):
            type(stretching)(stretching.model, stretching.tokenizer, other)
