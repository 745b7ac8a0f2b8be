"""`vitos distill`: train the evidence head of a checkpoint, for the plans one_pass and glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vitos.cli.screen import console, quiet

if TYPE_CHECKING:
    from vitos.config.recipe import HeadSection, Recipe
    from vitos.core.record import Record
    from vitos.rl.distill import DistillOptions, DistillReport

REPORT = "distill.json"


def distill(
    checkpoint: Annotated[str, typer.Argument(help='Folder, hub id, or "nano" for the embedded model.')],
    data: Annotated[list[Path], typer.Option("--data", help="Record file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    teacher: Annotated[
        Literal["own", "gold", "both"], typer.Option(help="Boxes to learn from: the policy's own, gold ones, or both.")
    ] = "own",
    head: Annotated[
        Literal["pointer", "glimpse"], typer.Option(help="Ours, or a rival: a learned token whose attention chooses.")
    ] = "pointer",
    plan: Annotated[
        list[str], typer.Option(help="Plan that the head is for, one_pass or glance; may be repeated.")
    ] = ["one_pass"],  # noqa: B006 (typer reads it)
    layers: Annotated[
        int | None, typer.Option(min=0, help="Layers that see all tokens; by default a quarter of the model's.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the visual tokens to keep, 0..1.")] = 0.25,
    steps: Annotated[int, typer.Option(min=1, help="Largest number of updates.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per update.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    validation: Annotated[float, typer.Option(help="Share of the images to stop and report on, 0..1.")] = 0.1,
    limit: Annotated[int | None, typer.Option(help="Number of questions of each file, from its start.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest localization of the teacher.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and split.")] = 0,
) -> None:
    """Train the head that finds evidence inside the first pass; the model's own weights stay as they are."""
    from vitos.rl.distill import DistillOptions

    options = DistillOptions(
        teacher=teacher,
        kind=head,
        plans=tuple(plan),
        layers=layers,
        keep=keep,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        max_tokens=max_tokens,
        seed=seed,
    )
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder")
    quiet()
    from vitos.data.files import write_json_atomic
    from vitos.data.readers import read_records
    from vitos.policy.vlm import SparseVLM
    from vitos.rl.checkpoint import staged_folder
    from vitos.rl.distill import distill as train_head

    records = [record for path in data for record in read_records(path)[:limit]]
    policy = SparseVLM.from_pretrained(checkpoint)
    report = train_head(policy, records, options, lambda text: console.print(text, highlight=False))
    with staged_folder(out) as staging:
        policy.save_pretrained(staging)
        write_json_atomic(staging / REPORT, {"data": [str(path) for path in data], **report.to_json()})
    console.print(recall_table(report))
    console.print(f"Head after layer {report.layers}: {out}. Answer by it with --plan {plan[0]}.")


def head_options(section: HeadSection, recipe: Recipe) -> DistillOptions:
    """How a recipe's head is trained.

    Raises:
        ValueError: for a plan that does not choose by an evidence head.
    """
    from vitos.rl.distill import DistillOptions

    return DistillOptions(
        plans=(section.plan,),
        layers=section.layers,
        keep=section.keep,
        steps=section.steps,
        max_tokens=recipe.train.max_localization_tokens,
        seed=recipe.seed,
    )


def add_head(
    folder: Path, options: DistillOptions, records: Sequence[Record], load: Mapping[str, Any], console: Console
) -> None:
    """Give the checkpoint in `folder` a head that learns from its own boxes, unless it has one.

    Args:
        load: options of `SparseVLM.from_pretrained`.
    """
    from vitos.data.files import write_json_atomic
    from vitos.policy.vlm import SparseVLM
    from vitos.rl.checkpoint import extended_folder
    from vitos.rl.distill import distill as train_head

    policy = SparseVLM.from_pretrained(folder, **load)
    if policy.backbone.evidence_head is None:
        console.print(f"[bold]Evidence head[/bold]: plan {options.plans[0]}, {len(records)} questions")
        report = train_head(policy, records, options)
        with extended_folder(folder) as staging:
            policy.save_beside(staging)
            write_json_atomic(staging / REPORT, report.to_json())
        console.print(recall_table(report))


def recall_table(report: DistillReport) -> Table:
    """Share of the cells of evidence that is found, by template and kept share."""
    title = f"Evidence found on {report.validated} held-out questions ({report.left_out} had no box)"
    shares = next(iter(report.recall.values()))
    table = Table("template", *(f"{share:g} kept" for share in shares), title=title)
    for name, row in report.recall.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    return table
