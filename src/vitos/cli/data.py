"""`vitos data`: check, convert and make data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import Progress
from rich.table import Table

from vitos.cli.screen import advance, console, quiet

if TYPE_CHECKING:
    from vitos.policy.vlm import SparseVLM
    from vitos.scans.build import BuildReport

data_app = typer.Typer(help="Check, convert and make data sets.", no_args_is_help=True)


@data_app.command("check")
def check(
    sources: Annotated[list[Path], typer.Argument(help="Record files, or folders of them.")],
) -> None:
    """Validate every record and image; exit 1 if training would refuse them."""
    from vitos.data.check import check_dataset, render_check

    failed = False
    for source in sources:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"checking {source}", total=None)
            report = check_dataset(source, progress=partial(advance, bar, task))
        console.print(render_check(report))
        failed |= bool(report.of("error"))
    if failed:
        raise typer.Exit(1)


@data_app.command("convert")
def convert_data(
    source: Annotated[str, typer.Argument(help="JSON/JSONL file, parquet file or folder, or hub:owner/name.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[Literal["json", "parquet"], typer.Option(help="Format to write.")] = "json",
    limit: Annotated[int | None, typer.Option(help="Number of questions to take of each split.")] = None,
) -> None:
    """Turn parquet shards or a hub data set into records with image files, or records into parquet."""
    from vitos.data.convert import convert

    with console.status(f"converting {source}"):
        count = convert(source, target, to=to, limit=limit)
    console.print(f"{count} questions in {target}")


@data_app.command("cache")
def cache_data(
    model: Annotated[str, typer.Argument(help="A recipe (.yaml or a name), or a checkpoint (folder, hub id, nano).")],
    data: Annotated[list[str] | None, typer.Option("--data", help="Record file; by default the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default the recipe's data.cache.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default the encoder's own.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, however large it gets.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the recipe.")] = None,
) -> None:
    """Compute the visual tokens of all images once, for training and evaluation; a second call continues the first."""
    quiet()
    from vitos.scans.build import build_cache

    policy, images, folder = cache_inputs(model, data or [], out, set_ or [])
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("caching", total=None)

        def confirm(text: str) -> bool:
            bar.stop()
            agreed = yes or (sys.stdin.isatty() and typer.confirm(f"{text} Go on?"))
            bar.start()
            return agreed

        report = build_cache(policy, images, folder, dtype, confirm=confirm, progress=partial(advance, bar, task))
    console.print(render_build(report))


@data_app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder for the images and one JSON file per split.")],
    train: Annotated[int, typer.Option(help="Number of questions of the train split.")] = 2000,
    val: Annotated[int, typer.Option(help="Number of questions of the validation split.")] = 256,
    test: Annotated[int, typer.Option(help="Number of questions of the test split.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed, 0..999; splits and seeds share no scene.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Pixels per side; nano was made for 128.")] = 128,
) -> None:
    """Make synthetic slices with boxed questions."""
    from vitos.data.phantom import write_phantoms

    for split, count in {"train": train, "val": val, "test": test}.items():
        with console.status(f"drawing {count} {split} questions"):
            path = write_phantoms(folder, split, count, seed, size)
        console.print(f"{count} questions in {path}")


def cache_inputs(
    model: str, data: Sequence[str], out: Path | None, overrides: Sequence[str]
) -> tuple[SparseVLM, list[Path], Path]:
    """Model, images and folder of `vitos data cache`, from a recipe or from the options.

    Raises:
        ValueError: if the images or the folder are named in neither.
    """
    from vitos.cli.run import load_policy, recipe_images
    from vitos.config.recipe import load_recipe
    from vitos.data.readers import read_records
    from vitos.policy.vlm import SparseVLM

    if is_recipe(model):
        recipe = load_recipe(model, overrides)
        policy, images = load_policy(recipe), [] if data else recipe_images(recipe)
        out = out or (Path(recipe.data.cache) if recipe.data.cache else None)
    elif overrides:
        raise ValueError("--set changes a recipe; give one instead of a checkpoint")
    else:
        policy, images = SparseVLM.from_pretrained(model), []
    images += [path for source in data for record in read_records(source) for path in record.image_paths]
    if not images:
        raise ValueError("no images; name record files with --data")
    if out is None:
        raise ValueError("no folder; name one with --out, or as data.cache in the recipe")
    return policy, list(dict.fromkeys(images)), out


def is_recipe(text: str) -> bool:
    """Whether `text` names a recipe; the name of a folder or of an embedded model is a checkpoint."""
    from vitos.config.shipped import recipe_names
    from vitos.nano import NANO, NANO_REAL

    named = text in recipe_names() and text not in (NANO, NANO_REAL) and not Path(text).is_dir()
    return text.endswith((".yaml", ".yml")) or named


def render_build(report: BuildReport) -> Table:
    """The report of a build as a table."""
    table = Table(title=str(report.folder), show_header=False, title_justify="left")
    rows = {
        "images": f"{report.images} distinct; {report.files} asked for",
        "computed now": f"{report.computed}, {report.tokens} visual tokens",
        "shards made again": ", ".join(report.dropped) or "–",
        "number format": report.dtype,
        "size": f"{report.size / (1 << 30):.3g} GiB",
        "seconds": f"{report.seconds:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
