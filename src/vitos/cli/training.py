"""Shared by `vitos train` and `vitos sft`: the recipe, the processes, and what Ctrl-C leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from vitos.cli.screen import console, quiet

if TYPE_CHECKING:
    from vitos.config.recipe import Recipe


def load_training(recipe: str, overrides: Sequence[str], *, dry_run: bool, resume: bool, processes: int) -> Recipe:
    """The recipe of a training, in as many processes as asked for; a dry run prints it and ends here."""
    from vitos.config.recipe import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        from vitos.cli.rehearse import rehearse

        quiet()
        for note in rehearse(loaded, resume=resume):
            Console(stderr=True).print(f"[dim]note:[/dim] {escape(note)}", highlight=False, soft_wrap=True)
        typer.echo(dump_recipe(loaded), nl=False)  # as it is: a console would break long lines
        raise typer.Exit
    if processes > 1:
        from vitos.cli import launch

        if not launch.launched():
            launch.relaunch(processes)
    quiet()
    return loaded


@contextmanager
def stopped_by_hand(folder: Path) -> Iterator[None]:
    """Say what Ctrl-C has left in a folder of checkpoints, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        from vitos.rl.checkpoint import complete_checkpoints

        found = complete_checkpoints(folder)
        where = f"{found[-1].name} in {folder} is complete" if found else "there is no checkpoint yet"
        console.print(f"\nStopped; {where}. Go on with --resume.")
        raise typer.Exit(130) from None
