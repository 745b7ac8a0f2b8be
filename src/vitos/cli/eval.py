"""`vitos bench`: each verb measures one thing and leaves its results in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitos.cli.screen import console, quiet

bench_app = typer.Typer(help="Measure.", no_args_is_help=True)


@bench_app.command("run")
def bench_run(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, as path or name=path.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and tables; a run that is there goes on.")],
    data: Annotated[list[str] | None, typer.Option("--data", help="Record file, or name=file; repeatable.")] = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="Published benchmark, NAME[@SPLIT][=FOLDER].")] = None,
    selector: Annotated[
        list[str] | None, typer.Option(help="Token selector; by default all that a model can follow.")
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Share of tokens, 0..1; by default the five.")] = None,
    looks: Annotated[bool, typer.Option(help="Also ask with changed pictures: does it look?")] = True,
    protocol: Annotated[Literal["choice", "open"], typer.Option(help="Which questions are asked.")] = "choice",
    base: Annotated[str | None, typer.Option(help="Model that accuracies are related to.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each set.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions decoded together.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest response.")] = 256,
    seed: Annotated[int, typer.Option(help="Of random tokens and shuffled images.")] = 0,
) -> None:
    """Models x benchmarks x token selectors x budgets, then the tables. In several processes: accelerate launch -m."""
    quiet()
    from vitos.eval.bench import read_sets, rescore, run_bench
    from vitos.eval.conditions import BUDGETS, Settings, bench_conditions
    from vitos.eval.run import Share, named_models
    from vitos.eval.selectors import SELECTORS

    conditions = bench_conditions(selector or tuple(SELECTORS), budget or BUDGETS, ablations=looks)
    settings = Settings(
        protocol=protocol,
        batch_size=batch_size,
        max_localization_tokens=max_tokens,
        max_reasoning_tokens=max_tokens,
        seed=seed,
    )
    named = dict(named_models(models))
    if base is not None and base not in named:
        raise typer.BadParameter(f"{base!r} is none of the models: {', '.join(named)}", param_hint="--base")
    sets = read_sets(data or [], benchmark or [], limit)
    run_bench(named, sets, conditions, settings, out, insist=selector is not None)
    if Share.of_launcher().index == 0:
        rescore(out, base)
        console.print(f"Report: {out / 'report.html'}")


@bench_app.command("rescore")
def bench_rescore(
    out: Annotated[Path, typer.Argument(help="Folder of a `vitos bench run` or `vitos eval`.")],
    base: Annotated[str | None, typer.Option(help="Model that accuracies are related to.")] = None,
) -> None:
    """Make all figures and tables anew from the stored answers, without a model."""
    from vitos.eval.bench import rescore

    rescore(out, base)
    console.print(f"Report: {out / 'report.html'}")
