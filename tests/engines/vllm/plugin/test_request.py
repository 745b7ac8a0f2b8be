"""The option of a request: everything malformed is refused, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.sparsify import Fusion
from vitos.engines.vllm.plugin.request import ImageOption, fusion_of, image_options, without_option


def options(**given):
    return {"max_pixels": 1000, "vitos": given}


def test_without_an_option_every_image_is_whole():
    whole = image_options({"max_pixels": 1000}, 2)
    assert whole == [ImageOption(), ImageOption()]
    assert [option.identity for option in whole] == [None, None]  # vLLM's own identity of the image stays
    assert whole[0].mask(5).tolist() == [True] * 5


def test_each_image_has_its_own_list():
    first, second = image_options(options(keep=[[4, 1, 1], None], fusion="mean"), 2)
    assert first == ImageOption((1, 4), Fusion("mean"))
    assert first.mask(6).tolist() == [False, True, False, False, True, False]
    assert second == ImageOption()
    assert without_option(options(keep=[None])) == {"max_pixels": 1000}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0]], "must be"),
        ({}, "must be"),
        ({"keep": [[0]], "margin": 1}, "must be"),
        ({"keep": "0"}, "one list"),
        ({"keep": [[0], [1]]}, "for each of 1 images"),
        ({"keep": [[]]}, "at least one"),
        ({"keep": ["01"]}, "at least one"),
        ({"keep": [[-1]]}, "whole numbers"),
        ({"keep": [[True]]}, "whole numbers"),
        ({"keep": [[0.0]]}, "whole numbers"),
        ({"keep": [[0]], "fusion": "max"}, "fusion"),
        ({"keep": [[0]], "beta": 1.5}, "beta"),
        ({"keep": [[0]], "beta": "a"}, "beta"),
        ({"keep": [[0]], "fusion": ["mean"]}, "fusion"),
    ],
)
def test_what_is_malformed_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        image_options({"vitos": given}, 1)


def test_an_index_behind_the_image_is_refused():
    (option,) = image_options(options(keep=[[0, 16]]), 1)
    with pytest.raises(ValueError, match="token 16 of an image with 16"):
        option.mask(16)


lists = st.lists(st.integers(0, 30), min_size=1, max_size=6)
fusions = st.builds(Fusion, st.sampled_from(["none", "mean", "weighted"]), st.floats(0, 1))


@given(lists, fusions, lists, fusions)
def test_identities_are_equal_where_the_visual_tokens_are(a, f, b, g):
    one, two = ImageOption(tuple(sorted(set(a))), f), ImageOption(tuple(sorted(set(b))), g)
    assert (one.identity == two.identity) == (one == two)


@given(fusions)
def test_a_fusion_survives_its_numbers(fusion):
    assert fusion_of(torch.tensor(ImageOption((0,), fusion).fusion_row, dtype=torch.float64)) == fusion
