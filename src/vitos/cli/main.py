"""The command line: verbs that call the library and print; an error is one line.

    vitos train RECIPE [--set train.learning_rate=2e-6] [--dry-run] [--resume]
    vitos sft RECIPE [--dry-run] [--resume]
    vitos recipes [show NAME | copy NAME]
    vitos eval CHECKPOINT --data test.json [--budget 0.25] [--base nano]
    vitos distill CHECKPOINT --data train.json --out FOLDER
    vitos ask CHECKPOINT IMAGE "question" [--overlay out.png]
    vitos serve [CHECKPOINT] [--port 8000]
    vitos demo [CHECKPOINT] [--port 7860]
    vitos data check|convert|cache|export|phantom …
    vitos bench run|rescore …
    vitos doctor [--recipe RECIPE]

`vitos VERB --help` says more about each.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vitos.cli.data import data_app
from vitos.cli.distill import distill
from vitos.cli.eval import bench_app
from vitos.cli.push import push
from vitos.cli.recipes import recipes_app
from vitos.cli.screen import console, needs_extra, quiet
from vitos.cli.training import load_training, stopped_by_hand
from vitos.config.judge import JudgeSection
from vitos.core.geometry import Box
from vitos.core.registry import PLANS
from vitos.core.version import __version__
from vitos.serve import NOTICE

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(recipes_app, name="recipes")
app.command()(distill)
app.command()(push)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vitos {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Dual-stream reinforcement learning for medical vision-language models. Research use only."""


def _plan(name: str | None) -> str | None:
    if name is not None and name not in PLANS.names():
        close = difflib.get_close_matches(name, PLANS.names(), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(PLANS.names())}{meant}")
    return name


PlanOption = Annotated[
    str | None,
    typer.Option(
        callback=_plan, metavar="|".join(PLANS.names()), help="Plan to answer by; by default the checkpoint's."
    ),
]
Checkpoint = Annotated[str, typer.Argument(help='Folder, hub id, or "nano" for the embedded model.')]


RecipeArgument = Annotated[str, typer.Argument(help="YAML file, or a name from `vitos recipes`.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print all values, stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")]
Processes = Annotated[int, typer.Option(min=1, help="Number of processes that share an update's questions.")]


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    processes: Processes = 1,
) -> None:
    """Train all stages of a recipe, evaluate the result and write the report."""
    loaded = load_training(recipe, set_ or [], dry_run=dry_run, resume=resume, processes=processes)
    from vitos.cli import run

    with stopped_by_hand(Path(loaded.output_dir)):
        folder = run.train(loaded, resume=resume, console=console)
    console.print(f"Model:  {folder / 'model'}")


@app.command()
def sft(
    recipe: RecipeArgument,
    set_: SetOption = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    processes: Processes = 1,
) -> None:
    """Train a recipe's warm start alone: boxes, thoughts and answers, supervised. `train --resume` goes on from it."""
    loaded = load_training(recipe, set_ or [], dry_run=dry_run, resume=resume, processes=processes)
    from vitos.cli import run
    from vitos.cli.resume import SFT, WARM_START
    from vitos.cli.sft import render_start

    with stopped_by_hand(Path(loaded.output_dir) / SFT):
        folder = run.start(loaded, resume=resume, console=console)
    console.print(render_start(folder))
    console.print(f"Model:  {folder / WARM_START}")


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str], typer.Option("--data", help="Record file or benchmark:NAME[@SPLIT][=FOLDER]; may be repeated.")
    ],
    base: Annotated[str | None, typer.Option(help="Model before training, to compare the accuracy with.")] = None,
    rl_dense: Annotated[str | None, typer.Option(help="Model trained without pruning, as a control.")] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the visual tokens, 0..1; may be repeated.")
    ] = None,
    controls: Annotated[bool, typer.Option(help="Also answer from the same number of other tokens.")] = True,
    limit: Annotated[int | None, typer.Option(help="Number of questions of each file, from its start.")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of questions decoded together.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Largest number of tokens of a response.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the random controls.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; by default eval/ in the model's folder.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of an embedding cache that fits all models.")] = None,
    plan: PlanOption = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server that also grades answers in words.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="Its model; by default the only one that it lists.")] = "",
    judge_prompt: Annotated[Path | None, typer.Option(help="File with another prompt for it.")] = None,
    judge_requests: Annotated[int | None, typer.Option(min=1, help="Largest number of requests to it.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Measure of answers in words: bleu, rouge or a plug-in; may be repeated.")
    ] = None,
    text_only: Annotated[
        bool | None, typer.Option(help="Also ask with a blank image; by default where answers are in words.")
    ] = None,
) -> None:
    """Answer a test set densely, sparsely and from control tokens; write results.json, cases and the HTML report."""
    if bad := [b for b in budget or () if not 0 < b <= 1]:
        raise typer.BadParameter(f"a budget is a share of the tokens in (0, 1], got {bad[0]}", param_hint="--budget")
    quiet()
    from vitos.eval.conditions import Settings
    from vitos.eval.evaluate import Evaluation, evaluate

    settings = Settings(
        batch_size=batch_size, max_localization_tokens=max_tokens, max_reasoning_tokens=max_tokens, seed=seed
    )
    evaluate(
        Evaluation(
            name=Path(checkpoint).name,
            checkpoint=checkpoint,
            data=tuple(data),
            settings=settings,
            base=base,
            rl_dense=rl_dense,
            controls=controls,
            budgets=tuple(budget or ()),
            limit=limit,
            cache=cache,
            plan=plan,
            text_only=text_only,
            judge=_judge(judge, judge_model, judge_prompt, judge_requests),
            metrics=tuple(metric or ()),
        ),
        out or (Path(checkpoint) / "eval" if Path(checkpoint).is_dir() else Path("runs") / "eval"),
        console=console,
    )


def _judge(url: str | None, model: str, prompt: Path | None, most: int | None) -> JudgeSection | None:
    """The judge of `vitos eval`; its key is in the environment."""
    if url is None:
        return None
    text = None if prompt is None else prompt.read_text(encoding="utf-8")
    return JudgeSection(url, model, prompt=text, max_requests=most)


@app.command()
def ask(
    checkpoint: Checkpoint,
    image: Annotated[
        Path,
        typer.Argument(
            help="Image file, with an optional frame, slice, window or crop: scan.dcm#frame=3. With --slices the "
            "folder of a DICOM series, or a volume: ct.nii.gz#axis=2."
        ),
    ],
    question: Annotated[str, typer.Argument(help='Question with its options: "…\\nA. nodule\\nB. cyst".')],
    overlay: Annotated[
        Path | None, typer.Option(help="File for a picture of the image with boxes and kept tokens.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A further image, or a further file of a series; may be repeated.")
    ] = None,
    slices: Annotated[
        str | None, typer.Option(help="Slices of a series or volume: 'every 4th', '12 evenly', 10-40 or all.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of each branch's response.")] = 256,
    plan: PlanOption = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="Evidence instead of the model's: x1,y1,x2,y2 in fractions of the image, with several images "
            "NUMBER:x1,y1,x2,y2; may be repeated."
        ),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, 0..1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
) -> None:
    """Answer one question about an image, several, or the slices of a series, from the tokens of its evidence."""
    boxes = [_box(text) for text in box or ()] or None
    if budget is not None and not 0 < budget <= 1:
        raise typer.BadParameter(f"a budget is a share of the tokens in (0, 1], got {budget}", param_hint="--budget")
    quiet()
    from vitos.cli.answer import answer_json, answer_table
    from vitos.cli.pictures import open_asked
    from vitos.core.stopwatch import Stopwatch
    from vitos.policy.plans import Limits
    from vitos.policy.vlm import SparseVLM
    from vitos.reports.sheet import draw_sheet

    asked = open_asked([image, *(also or ())], slices)
    warnings = tuple(dict.fromkeys(warning for facts in asked.facts for warning in facts.warnings))
    for warning in warnings:
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {escape(warning)}")
    boxes = boxes and [asked.placed(one) for one in boxes]
    vlm, watch = SparseVLM.from_pretrained(checkpoint), Stopwatch()
    scan = vlm.encode(*asked.pictures, plan=plan, lead=asked.lead, watch=watch).of_files(asked.facts)
    limits = Limits(max_tokens=max_tokens, max_evidence_tokens=max_tokens)
    text = question.replace("\\n", "\n")
    finding = vlm.ask(scan, text, boxes=boxes, budget=budget, plan=plan, limits=limits).with_encoding(watch)
    if overlay is not None:
        sheet = draw_sheet(asked.whole(), finding.grid, finding.kept.mask, finding.boxes, numbers=asked.numbers)
        sheet.save(overlay)
    if as_json:
        typer.echo(answer_json(finding, text, asked.summary(), asked.numbers, warnings))
        return
    console.print(answer_table(finding, text, asked.summary(), ", ".join(map(asked.named, finding.boxes))))
    console.print(f"[dim]{NOTICE}[/dim]")
    if overlay is not None:
        console.print(f"Overlay: {overlay}")


def _box(text: str) -> Box:
    """`x1,y1,x2,y2`, or `2:x1,y1,x2,y2`, as a box."""
    from vitos.cli.pictures import read_box

    try:
        return read_box(text)
    except (TypeError, ValueError) as error:
        wanted = (
            "write x1,y1,x2,y2 in fractions of the image, such as 0.1,0.2,0.4,0.5, or 2:0.1,0.2,0.4,0.5 for the "
            f"second of several; got {text!r} ({error})"
        )
        raise typer.BadParameter(wanted, param_hint="--box") from None


@app.command()
def demo(
    checkpoint: Checkpoint = "nano",
    data: Annotated[
        list[Path] | None, typer.Option(help="Record file whose questions are the examples; may be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which the page may be opened, without port; may be repeated."),
    ] = None,
) -> None:
    """Show in a browser what a model looks at: boxes, kept tokens, and answers from dense and random tokens."""
    from vitos.policy.locate import resolve_model_path

    quiet()
    found = resolve_model_path(checkpoint)  # a wrong name is said before slow imports
    from vitos.serve.demo.private import private_folder

    announce = partial(console.print, f"http://{host}:{port}  (Ctrl+C stops)  [dim]{NOTICE}[/dim]")
    with private_folder() as folder:
        with needs_extra("demo", "gradio"):
            from vitos.serve.demo.page import launch
        from vitos.policy.vlm import SparseVLM

        vlm = SparseVLM.from_pretrained(found)
        launch(
            vlm, folder, data=data or (), model=checkpoint, host=host, port=port, allow_hosts=allow_host or (),
            announce=announce,
        )  # fmt: skip


@app.command()
def serve(
    checkpoint: Checkpoint = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    images: Annotated[Path | None, typer.Option(help="Folder whose files requests may name as file:NAME.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Number of questions decoded together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Number of waiting questions; more get status 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of each branch's response.")] = 256,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest size of a request, in megabytes.")] = 32,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="Largest size of a request's images, in megapixels.")
    ] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit of an answer, in seconds.")] = 120.0,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; by default the run's or the checkpoint's.")
    ] = None,
) -> None:
    """Answer OpenAI's chat completions over HTTP. Clients must send VITOS_TOKEN, if it is set, as bearer token."""
    if name is not None and not (name.strip() and name.isprintable()):
        raise typer.BadParameter("a name is printable text, not empty", param_hint="--name")
    quiet()
    with needs_extra("serve", "fastapi", "prometheus_client", "uvicorn"):
        from vitos.serve.api.app import ServerSettings
        from vitos.serve.api.launch import model_name, run_server

    run_server(
        checkpoint,
        ServerSettings(
            name=model_name(checkpoint) if name is None else name,
            token=os.environ.get("VITOS_TOKEN") or None,
            images=images,
            max_running=max_running,
            max_waiting=max_waiting,
            max_tokens=max_tokens,
            max_bytes=max_megabytes << 20,
            max_pixels=max_megapixels * 1_000_000,
            seconds=seconds,
        ),
        host,
        port,
        console,
    )


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Option(help="Estimate memory and time of this recipe instead.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Number of processes, one per device.")] = None,
    device: Annotated[
        str | None, typer.Option(help='Device of the recipe: H100, L40S, …, or figures: "80GB 989TFLOPS 3.35TB/s".')
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="results.json of scripts/gpu_check.py, for its speeds instead of assumed ones.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Number of distinct training images, if known.")] = None,
    probe: Annotated[int | None, typer.Option(min=1, help="Questions to roll out: is the model ready for RL?")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the recipe.")] = None,
) -> None:
    """Check this machine, or estimate the memory and time of a recipe; exit 1 if something is missing."""
    if probe and recipe is None:
        raise typer.BadParameter("is asked of a recipe; name one with --recipe", param_hint="--probe")
    from vitos.cli.doctor import check_machine, check_recipe_fits

    ready = (
        check_machine()
        if recipe is None
        else check_recipe_fits(recipe, set_ or [], devices, device, images, measured, probe)
    )
    if not ready:
        raise typer.Exit(1)


def main() -> None:
    """Entry point. An error that a user can mend is one line on stderr with exit code 1; a wrong call exits with 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        # The package's errors (DataError, ConfigError, CheckpointError …) say what to do. VITOS_TRACEBACK=1 shows
        # where they were raised.
        if os.environ.get("VITOS_TRACEBACK"):
            raise
        message = f"[bold red]error:[/bold red] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)
