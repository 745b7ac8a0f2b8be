"""`vitos data`: check, convert and make data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    sources: Annotated[
        list[str],
        typer.Argument(help="Record files, folders of them, benchmark:NAME[@SPLIT][=FOLDER], or one recipe (.yaml)."),
    ],
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for warnings, too.")] = False,
) -> None:
    """Validate every record and image, and find what splits share; exit 1 if training would refuse them."""
    from vitos.data.check import render_check
    from vitos.eval.sources import check_sources

    named, splits = check_inputs(sources)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("checking", total=None)
        reports = check_sources(named, splits, partial(advance, bar, task))
    for report in reports:
        console.print(render_check(report))
    if any(report.of("error") or (strict and report.of("warning")) for report in reports):
        raise typer.Exit(1)


@data_app.command("convert")
def convert_data(
    source: Annotated[
        str,
        typer.Argument(
            help="JSON/JSONL file, parquet file or folder, hub:owner/name, or benchmark:NAME[@SPLIT][=FOLDER]."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="Format to write: json (records), parquet, coco or yolo.")] = "json",
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each split, this many.")] = None,
    boxed: Annotated[
        str | None, typer.Option("--from", help="Format of annotations: coco, yolo, masks, vindr or visual_cot.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, with --from.")] = None,
) -> None:
    """Turn parquet, a hub data set or annotations into records with image files, or records into parquet or such."""
    from vitos.data.boxed import convert_boxed
    from vitos.data.convert import convert
    from vitos.eval.sources import convert_benchmark, is_benchmark

    with console.status(f"converting {source}"):
        if boxed is not None or to not in ("json", "parquet"):
            if limit is not None:
                raise ValueError("--limit goes with json and parquet only; convert all, then cut the record files")
            count = convert_boxed(Path(source), target, boxed, None if to == "json" else to, images)
        elif not is_benchmark(source):
            count = convert(source, target, to="json" if to == "json" else "parquet", limit=limit)
        elif to == "json":
            count = convert_benchmark(source, target, limit)
        else:
            raise ValueError(f"{source}: convert it to json first, and the folder to parquet")
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


@data_app.command("export")
def export_data(
    model: Annotated[str, typer.Argument(help="A recipe (.yaml or a name), or a checkpoint (folder, hub id, nano).")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option("--format", help="llamafactory or ms-swift.")] = "llamafactory",
    data: Annotated[list[str] | None, typer.Option("--data", help="Record file; by default the recipe's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the recipe.")] = None,
) -> None:
    """Write the targets of `vitos sft` (boxes, thoughts, answers) as chat JSON with pictures, for other programs."""
    quiet()
    from vitos.eval.sources import read_set
    from vitos.rl.export import export_chat

    policy, sources = export_inputs(model, data or [], set_ or [])
    records = [record for source in sources for record in read_set(source).records]
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("writing", total=None)
        count = export_chat(policy, records, out, to, partial(advance, bar, task))
    console.print(f"{count} conversations about {len(records)} questions in {out}")


@data_app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder for images and one JSON per split.")],
    train: Annotated[int, typer.Option(help="Questions of the train split; 0: leave it as it is.")] = 2000,
    val: Annotated[int, typer.Option(help="Questions of the validation split; 0: leave it as it is.")] = 256,
    test: Annotated[int, typer.Option(help="Questions of the test split; 0: leave it as it is.")] = 600,
    seed: Annotated[int, typer.Option(help="0..999; splits and seeds share no scene.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Pixels per side; nano was made for 128.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace splits made with other settings.")] = False,
    in_words: Annotated[bool, typer.Option("--in-words", help="The same questions without options.")] = False,
) -> None:
    """Make synthetic slices with boxed questions."""
    from vitos.data.phantom import write_phantoms
    from vitos.data.phantom_files import PhantomSettings, refuse_others

    counts = {split: count for split, count in {"train": train, "val": val, "test": test}.items() if count}
    if not overwrite:  # before anything is written
        refuse_others(folder, {split: PhantomSettings(count, seed, size) for split, count in counts.items()})
    for split, count in counts.items():
        with console.status(f"drawing {count} {split} questions"):
            path = write_phantoms(folder, split, count, seed, size, overwrite=overwrite, in_words=in_words)
        console.print(f"{count} questions in {path}")


def check_inputs(sources: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The sources to check, and the split of each, where a recipe says what is trained on; else None.

    Raises:
        ValueError: for a recipe among other sources, or a ConfigError from the recipe.
    """
    from vitos.config.recipe import load_recipe

    if not any(source.endswith((".yaml", ".yml")) for source in sources):
        return list(dict.fromkeys(sources)), None
    if len(sources) > 1:
        raise ValueError("give one recipe alone, or record files and folders")
    return load_recipe(sources[0]).data.splits


def cache_inputs(
    model: str, data: Sequence[str], out: Path | None, overrides: Sequence[str]
) -> tuple[SparseVLM, list[Path], Path]:
    """Model, images and folder of `vitos data cache`, from a recipe or from the options.

    Raises:
        ValueError: if the images or the folder are named in neither.
    """
    from vitos.cli.run import load_policy, recipe_images
    from vitos.config.recipe import load_recipe
    from vitos.eval.sources import read_set
    from vitos.policy.vlm import SparseVLM

    if is_recipe(model):
        recipe = load_recipe(model, overrides)
        policy, images = load_policy(recipe), [] if data else recipe_images(recipe)
        out = out or (Path(recipe.data.cache) if recipe.data.cache else None)
    elif overrides:
        raise ValueError("--set changes a recipe; give one instead of a checkpoint")
    else:
        policy, images = SparseVLM.from_pretrained(model), []
    images += [path for source in data for record in read_set(source).records for path in record.image_paths]
    if not images:
        raise ValueError("no images; name record files with --data")
    if out is None:
        raise ValueError("no folder; name one with --out, or as data.cache in the recipe")
    return policy, list(dict.fromkeys(images)), out


def export_inputs(model: str, data: Sequence[str], overrides: Sequence[str]) -> tuple[SparseVLM, list[str]]:
    """Model and record files of `vitos data export`, from a recipe or from the options.

    Raises:
        ValueError: if the files are named in neither.
    """
    from vitos.cli.run import load_policy
    from vitos.config.recipe import load_recipe
    from vitos.policy.vlm import SparseVLM

    if is_recipe(model):
        recipe = load_recipe(model, overrides)
        return load_policy(recipe), [*(data or recipe.data.train)]
    if not data:
        raise ValueError("no questions; name record files with --data")
    return SparseVLM.from_pretrained(model), [*data]


def is_recipe(text: str) -> bool:
    """Whether `text` names a recipe; the name of a folder or of an embedded model is a checkpoint."""
    from vitos.config.shipped import recipe_names
    from vitos.nano import EMBEDDED

    named = text in recipe_names() and text not in EMBEDDED and not Path(text).is_dir()
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
