"""`vitos bench`: compare models, benchmarks and token selectors, and make the tables again from stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitos.cli.screen import console, quiet

bench_app = typer.Typer(
    help="Compare models, benchmarks and token selectors at several budgets.", no_args_is_help=True
)


@bench_app.command("run")
def bench_run(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, as path or name=path.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and tables; an unfinished run in it is continued.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Record file, or name=file; may be repeated.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="Published benchmark, NAME[@SPLIT][=FOLDER]; may be repeated."),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(help="Name of a token selector; may be repeated; by default all that a model can follow."),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the visual tokens, 0..1; may be repeated; by default five of them."),
    ] = None,
    looks: Annotated[
        bool, typer.Option(help="Also ask with changed pictures, to see whether the model looks at them.")
    ] = True,
    protocol: Annotated[
        Literal["choice", "open"], typer.Option(help="Questions to ask: closed ones only, or open ones as well.")
    ] = "choice",
    positions: Annotated[
        Literal["keep", "renumber"] | None,
        typer.Option(help="Positions of kept tokens; by default as each model was trained."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Name of the model that accuracies are compared with.")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of questions of each set, from its start.")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of questions decoded together.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Largest number of tokens of a response.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random tokens and shuffled images.")] = 0,
) -> None:
    """Answer benchmarks with each model, token selector and budget, then write the tables.

    For several processes: accelerate launch -m vitos bench run ...
    """
    quiet()
    from vitos.eval.bench import read_sets, rescore, run_bench
    from vitos.eval.conditions import BUDGETS, Settings, bench_conditions
    from vitos.eval.run import Share, named_models

    conditions = bench_conditions(selector, budget or BUDGETS, ablations=looks)
    settings = Settings(
        protocol=protocol,
        batch_size=batch_size,
        max_localization_tokens=max_tokens,
        max_reasoning_tokens=max_tokens,
        seed=seed,
        positions=positions,
    )
    named = dict(named_models(models))
    if base is not None and base not in named:
        raise typer.BadParameter(f"{base!r} is not one of the models: {', '.join(named)}", param_hint="--base")
    sets = read_sets(data or [], benchmark or [], limit)
    run_bench(named, sets, conditions, settings, out, insist=selector is not None)
    if Share.of_launcher().index == 0:
        rescore(out, base)
        console.print(f"Report: {out / 'report.html'}")


@bench_app.command("rescore")
def bench_rescore(
    out: Annotated[Path, typer.Argument(help="Folder of a `vitos bench run` or `vitos eval`.")],
    base: Annotated[str | None, typer.Option(help="Name of the model that accuracies are compared with.")] = None,
) -> None:
    """Make all figures and tables again from the stored answers, without a model."""
    from vitos.eval.bench import rescore

    rescore(out, base)
    console.print(f"Report: {out / 'report.html'}")


@bench_app.command("leaderboard")
def bench_leaderboard(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `vitos bench run`.")],
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.md and leaderboard.html.")],
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the visual tokens; may be repeated; by default 0.1, 0.25, 0.5 and 0.77."),
    ] = None,
    seeds: Annotated[bool, typer.Option("--seeds", help="The models of a folder are seeds of one model.")] = False,
) -> None:
    """Rank token selectors by their stored answers, without a model."""
    from vitos.eval.leaderboard import BUDGETS, TEXT, boards, write_leaderboard

    write_leaderboard(out, boards(folders, budget or BUDGETS, seeds=seeds))
    console.print(f"Leaderboard: {out / TEXT}")
