"""Timing scripts for developers: each verb measures one thing and leaves its results in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from vitos.cli.screen import advance, console, quiet

app = typer.Typer(help="Measure.", no_args_is_help=True)


@app.command("infer")
def infer(
    out: Annotated[Path, typer.Option(help="Folder for inference.json, .md and .png.")],
    model: Annotated[
        str, typer.Option(help="nano, or the layer shapes of Qwen2.5-VL-3B-Instruct or -7B-Instruct, random weights.")
    ] = "nano",
    parts: Annotated[int, typer.Option(help="Build one layer in so many of a published model: 1, 2 or 4.")] = 4,
    plan: Annotated[list[str] | None, typer.Option(help="By default all; dense is always run.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Pixels a side; by default 512 and 1024.")] = None,
    kept: Annotated[list[float] | None, typer.Option(help="Share of the tokens; by default 0.25.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Questions together; by default 1.")] = None,
    runs: Annotated[int, typer.Option(help="Timed runs; one more warms up.")] = 5,
    early: Annotated[float, typer.Option(help="Share of the layers before plan one_pass drops tokens.")] = 0.25,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cpu",
) -> None:
    """Time every plan stage by stage, beside one dense pass of the same engine."""
    quiet()
    from benchmarks.inference import Settings, run_benchmark
    from benchmarks.inference_page import write_inference

    given = {"plans": plan, "sizes": size, "kept": kept, "batches": batch}
    chosen: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values}
    settings = Settings(model, parts, dtype, device, runs=runs, early=early, **chosen)
    with console.status("building the model") as status:
        results = run_benchmark(settings, progress=status.update)
    results["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_inference(out, results)
    console.print(f"Results: {out / 'inference.md'}")


@app.command("questions")
def questions(
    out: Annotated[Path, typer.Option(help="Folder for questions.json and .md.")],
    model: Annotated[str, typer.Option(help="As in infer.")] = "nano",
    parts: Annotated[int, typer.Option(help="As in infer.")] = 4,
    plan: Annotated[list[str] | None, typer.Option(help="By default two_pass and gather.")] = None,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    kept: Annotated[float, typer.Option(help="Share of the tokens.")] = 0.25,
    questions: Annotated[int, typer.Option(help="About the image, at most 24.")] = 10,
    runs: Annotated[int, typer.Option(help="Timed runs; one more warms up.")] = 3,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cpu",
) -> None:
    """Time many questions about one image, asked together, beside one question, and compare their answers."""
    quiet()
    from benchmarks.many_questions import Questions, markdown, run_questions, write

    asked = Questions(model, parts, dtype, device, size=size, kept=kept, count=questions, runs=runs)
    if plan:
        asked = replace(asked, plans=tuple(plan))
    with console.status("building the model") as status:
        results = run_questions(asked, progress=status.update)
    write(results, out)
    console.print(markdown(results), markup=False, soft_wrap=True)


@app.command("volume")
def volume(
    out: Annotated[Path, typer.Option(help="Folder for volume.json and .md.")],
    model: Annotated[str, typer.Option(help="As in infer.")] = "nano",
    parts: Annotated[int, typer.Option(help="As in infer.")] = 4,
    slices: Annotated[int, typer.Option(min=1, help="Slices of the volume.")] = 40,
    size: Annotated[int, typer.Option(help="Pixels a side of a slice.")] = 256,
    evidence: Annotated[int, typer.Option(min=1, help="Slices with a box.")] = 3,
    kept: Annotated[float, typer.Option(help="Share of such a slice that its box covers.")] = 0.1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are written.")] = 16,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cpu",
) -> None:
    """Memory of a question about a volume after localization, compared with a question about one slice."""
    quiet()
    from benchmarks.volume import VolumeSettings, markdown, run_volume, write

    settings = VolumeSettings(
        model=model, parts=parts, dtype=dtype, device=device, slices=slices, size=size, evidence=evidence, kept=kept,
        tokens=tokens,
    )  # fmt: skip
    with console.status("building the model") as status:
        results = run_volume(settings, progress=status.update)
    write(results, out)
    console.print(markdown(results), markup=False, soft_wrap=True)


@app.command("shapes")
def shapes(
    out: Annotated[Path, typer.Option(help="Folder of results.json and table.md.")] = Path("studies/true_shapes"),
    model: Annotated[list[str] | None, typer.Option(help="Known name; may be repeated.")] = None,
    pixels: Annotated[list[int] | None, typer.Option(min=56, help="Side of the image; may be repeated.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of each model that are made.")] = 2,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Paired runs of every share.")] = 3,
) -> None:
    """Prefill time, memory and KV cache of sparse prompts in layers of the published models' shapes; resumable."""
    quiet()
    from benchmarks.true_shapes import MODELS, TABLE, ShapesSettings, run_shapes
    from vitos.doctor.shapes import KNOWN

    names = model or MODELS
    if unknown := [name for name in names if name not in KNOWN]:
        raise typer.BadParameter(f"{unknown[0]} is not known; known are {', '.join(KNOWN)}", param_hint="--model")
    plan = ShapesSettings(tuple(pixels or ShapesSettings().pixels), layers=layers, dtype=dtype, rounds=rounds)
    with console.status("starting") as status:
        run_shapes(out, plan, {name: KNOWN[name] for name in names}, status.update)
    console.print((out / TABLE).read_text(encoding="utf-8"), markup=False, soft_wrap=True)


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder for results.json and table.md.")] = Path("runs/bench-train"),
    shape: Annotated[list[str] | None, typer.Option(help="nano, nano-256 or qwen2.5-vl; may be repeated.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="G = K; may be repeated.")] = None,
    compare_to: Annotated[int, typer.Option(help="Largest G = K at which the other ways run, too.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of every completion.")] = 16,
    questions: Annotated[int, typer.Option(help="Of a step.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured steps of each kind.")] = 5,
    micro_batch_tokens: Annotated[int, typer.Option(help="Padded tokens of one forward pass.")] = 16_384,
) -> None:
    """Time one training step beside the same step without sharing and beside TRL, in turns on the same cores."""
    from benchmarks import train_step

    chosen = {"shapes": tuple(shape)} if shape else {}
    bench = train_step.TrainBench(
        groups=tuple(group or (2, 4, 8, 16)),
        compare_to=compare_to,
        questions=questions,
        tokens=tokens,
        repeats=repeats,
        micro_batch_tokens=micro_batch_tokens,
        **chosen,
    )
    with Progress(console=console, transient=True) as bar:
        results = train_step.measure(bench, partial(advance, bar, bar.add_task("steps", total=None)))
    train_step.write(results, out)
    console.print(train_step.render(results))
    for line in train_step.conclusions(results):
        console.print(line, highlight=False)
    console.print(f"Results: {out}")


@app.command("report")
def report(
    out: Annotated[Path, typer.Option(help="Empty folder for the reports and report.json.")],
    cases: Annotated[list[int] | None, typer.Option(help="Numbers of cases; by default 5000.")] = None,
    loads: Annotated[int, typer.Option(min=1, help="Number of loads; the median is given.")] = 7,
) -> None:
    """Size and first paint of report.html in the system's Chromium."""
    import json

    from benchmarks.report_page import measure

    rows = {}
    for count in cases or [5000]:
        folder = out / str(count)
        folder.mkdir(parents=True)
        with Progress(console=console, transient=True) as bar:
            rows[count] = measure(count, folder, loads, partial(advance, bar, bar.add_task("loads", total=loads)))
        shown = rows[count]
        console.print(
            f"{count} cases: {shown['megabytes']:.2f} MB, first paint after {shown['paint_ms']:.0f} ms, "
            f"table after {shown['table_ms']:.0f} ms (median of {loads})"
        )
    (out / "report.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
