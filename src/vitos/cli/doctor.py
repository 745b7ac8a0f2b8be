"""The work of `vitos doctor`: print what the machine has, or what a recipe needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitos.cli.screen import console, quiet
from vitos.doctor.machine import checks_table, diagnose, is_ready


def check_machine() -> bool:
    """Print the checks of this machine; whether nothing required is missing."""
    checks = diagnose()
    console.print(checks_table(checks))
    return is_ready(checks)


def check_recipe_fits(
    recipe: str,
    overrides: Sequence[str],
    devices: int | None,
    device: str | None,
    images: int | None,
    measured: Path | None,
    probe: int | None,
) -> bool:
    """Print the estimate of a recipe and, if asked for, a probe of its model; whether nothing required is missing.

    Args:
        recipe: a recipe's file or name.
        overrides: `--set` of the recipe.
        devices, images: as `diagnose_recipe`.
        device: name or figures of the devices; None: the GPU of this machine.
        measured: results of `scripts/gpu_check.py` to take speeds from.
        probe: number of questions to roll out; None: no probe.
    """
    quiet()
    from vitos.config.recipe import load_recipe
    from vitos.doctor.devices import find_device
    from vitos.doctor.recipe import diagnose_recipe, render_diagnosis
    from vitos.doctor.speed import Assumptions, measured_assumptions

    loaded = load_recipe(recipe, overrides)
    speeds = measured_assumptions(measured) if measured else Assumptions()
    diagnosis = diagnose_recipe(loaded, devices, find_device(device) if device else None, images, speeds)
    console.print(render_diagnosis(diagnosis))
    if probe:
        from vitos.cli.run import probe_recipe
        from vitos.doctor.probe import render_probe

        console.print(render_probe(probe_recipe(loaded, probe)))
    return is_ready(diagnosis.checks)
