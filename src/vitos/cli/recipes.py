"""`vitos recipes`: list, show and copy the recipes that come with vitos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vitos.cli.screen import console

recipes_app = typer.Typer(help="List, show and copy the recipes that come with vitos.")

Name = Annotated[str, typer.Argument(help="Name from the list, such as quickstart or accelerate/8gpu.")]


@recipes_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with vitos. `vitos train NAME` runs one, from any folder."""
    if context.invoked_subcommand is not None:
        return
    from vitos.config.shipped import launch_names, recipe_names

    table = Table("name", "model", "what it is", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name in recipe_names():
        table.add_row(name, *_summary(name))
    console.print(table)
    console.print(f"\nLaunch configurations for several processes: {', '.join(launch_names())}", highlight=False)


@recipes_app.command("show")
def show(name: Name) -> None:
    """Print a recipe's YAML, comments included."""
    from vitos.config.shipped import shipped_file

    typer.echo(shipped_file(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="New file, or a folder; by default NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe, to change it. An existing file is never overwritten."""
    from vitos.config.shipped import shipped_file

    source = shipped_file(name)
    target = Path(source.name) if target is None else target / source.name if target.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise FileExistsError(f"{target} exists; name another target, or remove it first") from None
    console.print(f"Copied to {target}", markup=False, highlight=False, soft_wrap=True)


def _summary(name: str) -> tuple[str, str]:
    """The model of a recipe, and the first line of its comments."""
    from vitos.config.shipped import shipped_file
    from vitos.config.yaml_file import parse_yaml

    text = shipped_file(name).read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    values = parse_yaml(text)
    return str((values.get("model") or {}).get("path", "nano")), first.removeprefix("#").strip()
