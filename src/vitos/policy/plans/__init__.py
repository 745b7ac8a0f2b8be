"""The ways to answer a question, one file each: which tokens localization sees, and which ones reasoning sees.

    two_pass   localize on all visual tokens; prefill a new prompt of the kept ones (the paper)
    gather     localize on all; keep the keys and values of the kept tokens, drop the others, go on behind them
    coarse     localize on the image at half its width and height; encode the evidence alone at full resolution
    dense      no localization: reason on all visual tokens (reference)
    crop       localize on all; cut the evidence out and encode it as an image (reference)

A plan is one file with one subclass of `Plan`; the name of the file is the name of the plan. Add a file here, or an
entry point of the group `vitos.plans`, and every command knows it. No other file compares a plan's name: the facts
that others need are attributes of the plan. Read `base.py` first, then `two_pass.py`.
"""

from __future__ import annotations

from functools import cache

from vitos.config.recipe import Recipe
from vitos.config.yaml_file import ConfigError
from vitos.core.registry import PLANS
from vitos.policy.plans.base import Limits, Outcome, Plan, Reasoning, Request, Steps

__all__ = ["Limits", "Outcome", "Plan", "Reasoning", "Request", "Steps", "check_recipe", "get_plan"]


@cache
def get_plan(name: str) -> Plan:
    """The plan with a given name.

    >>> get_plan("gather").shares_prefix
    True

    Raises:
        ValueError: if there is none; the message lists the known plans.
    """
    try:
        module = PLANS.module(name)
    except ValueError as error:
        raise ValueError(f"there is no such plan: {error}") from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Plan) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} must define exactly one subclass of Plan, but it defines {len(found)}")
    plan: Plan = found[0](name)
    return plan


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that contradicts its plan.

    Raises:
        ConfigError: with all contradictions, each with its key.
    """
    problems = [f"{key}: {message}" for key, message in get_plan(recipe.sparsify.plan).recipe_problems(recipe)]
    if problems:
        raise ConfigError(recipe.name, problems)
