"""Defaults and choices that the recipe repeats, because the code that they belong to imports NumPy or torch."""

import dataclasses
import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.backbones.base import CoordinateStyle
from vitos.config.options import DualStreamOptions
from vitos.config.recipe import (
    ConfigError,
    ExtraRewardSection,
    ModelSection,
    RewardsSection,
    SparsifySection,
    load_recipe,
)
from vitos.core.sparsify import Fusion, FusionMode, KeepRule
from vitos.policy.spec import VitosSpec
from vitos.rl.advantages import AdvantageGroup, group_advantages
from vitos.rl.rewards import Branch, RewardWeights
from vitos.rl.schedule import make_stages


def choices(section, name):
    """Values that a key may have, `null` left out."""
    hint = get_type_hints(section)[name]
    return get_args(next(part for part in (hint, *get_args(hint)) if get_origin(part) is Literal))


def test_a_recipe_without_a_sparsify_section_sparsifies_as_the_code_does_by_default():
    section = SparsifySection()
    assert KeepRule(section.margin, section.min_tokens) == KeepRule() == VitosSpec().keep
    assert Fusion(section.fusion, section.beta) == Fusion() == VitosSpec().fusion
    assert section.positions == VitosSpec().positions


def test_reward_weights_are_those_of_a_recipe_without_a_rewards_section():
    section = dataclasses.asdict(RewardsSection())
    assert section.pop("extra") == ()
    assert section == dataclasses.asdict(RewardWeights())


def test_advantages_are_by_default_those_of_a_recipe():
    options = DualStreamOptions()
    defaults = {name: p.default for name, p in inspect.signature(group_advantages).parameters.items()}
    assert defaults["group"] == options.advantage_group
    assert defaults["scale"] == options.scale_advantages
    assert defaults["std_floor"] == options.advantage_std_floor


@pytest.mark.parametrize(
    ("section", "name", "known"),
    [
        (SparsifySection, "fusion", get_args(FusionMode)),
        (SparsifySection, "positions", choices(VitosSpec, "positions")),
        (ModelSection, "coordinates", get_args(CoordinateStyle)),
        (ExtraRewardSection, "branch", get_args(Branch)),
        (DualStreamOptions, "advantage_group", get_args(AdvantageGroup)),
    ],
)
def test_a_key_has_the_choices_of_the_code(section, name, known):
    assert choices(section, name) == known


def test_every_schedule_of_a_recipe_has_stages():
    for schedule in choices(DualStreamOptions, "schedule"):
        assert make_stages(DualStreamOptions(schedule=schedule))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("name: t\noutput_dir: runs/t\ndata: {train: a.json}\n")
    return path


@given(st.integers(-2, 3), st.integers(-2, 3), st.floats(-0.5, 1.5))
def test_the_recipe_and_the_code_allow_the_same_values(recipe, margin, min_tokens, beta):
    changes = [f"sparsify.margin={margin}", f"sparsify.min_tokens={min_tokens}", f"sparsify.beta={beta!r}"]
    assert accepted(load_recipe, recipe, changes) == (
        accepted(KeepRule, margin, min_tokens) and accepted(Fusion, "weighted", beta)
    )


@given(st.sampled_from(["format", "iou", "accuracy", "feedback"]), st.floats(-1, 1) | st.just(float("inf")))
def test_the_recipe_and_the_reward_weights_allow_the_same_values(recipe, name, value):
    text = ".inf" if value == float("inf") else repr(value)
    assert accepted(load_recipe, recipe, [f"rewards.{name}={text}"]) == accepted(RewardWeights, **{name: value})


def accepted(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ConfigError, ValueError):
        return False
    return True
