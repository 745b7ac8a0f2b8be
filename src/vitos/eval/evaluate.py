"""`vitos eval`: a trained model with its base, its controls and its budgets, as one run of the evaluator.

The output folder holds

    results.json, cases.jsonl, report.html      figures, all questions with all their answers, the page
    answers/<fingerprint>/                      the answers as they came (`vitos.eval.store`), one folder for each
                                                combination of weights, questions and settings

so a run that was stopped goes on, another model never overwrites an answer, and scores can be made again without a
model (`vitos bench rescore FOLDER`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from vitos.config.judge import JudgeSection
from vitos.config.recipe import Recipe
from vitos.core.record import Record
from vitos.core.registry import PLANS
from vitos.core.version import __version__
from vitos.data.files import atomic_write, write_json_atomic, write_text_atomic
from vitos.engines.judge.judge import Judge
from vitos.eval.cases import BASE, HEAD, RL_DENSE, TRAINED, cases_of
from vitos.eval.conditions import BLANK, DENSE, LOCALIZE, OWN_BOXES, EvalSet, Settings, control_conditions
from vitos.eval.judged import GRADES, grade_answers
from vitos.eval.metrics import check_metrics
from vitos.eval.results import summarize
from vitos.eval.run import AskedModel, run_models
from vitos.eval.sources import read_set
from vitos.eval.store import EvalFolder, questions_fingerprint
from vitos.policy.locate import resolve_model_path
from vitos.policy.plans import get_plan
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM
from vitos.reports.card import model_card
from vitos.reports.html import write_report
from vitos.reports.table import results_table

RESULTS, CASES, REPORT, ASKED = "results.json", "cases.jsonl", "report.html", "evaluation.json"
MOST_UNREAD = 0.5
"""Share of unreadable answers from which the advice to start supervised is given."""

SPANS = (
    "vision",
    "prefix",
    "early_prefill",
    "localize_prefill",
    "localize_decode",
    "sparsify",
    "reason_prefill",
    "reason_decode",
)
"""Spans of time in `seconds_by_stage`, in their order."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The models, data sets and conditions of an evaluation.

    >>> asked = Evaluation(name="mine", checkpoint="runs/mine/model", data=("test.json",), base="nano")
    >>> asked.controls, asked.settings.batch_size
    (True, 64)

    Attributes:
        name: name of the run in the report.
        checkpoint: path of the trained model.
        data: record files and `benchmark:NAME[@SPLIT][=FOLDER]`, one data set each.
        settings: longest responses, batch size and seed.
        base: path of the model before training; None: there is no dense accuracy to relate to.
        rl_dense: path of a model trained without pruning, or None.
        head_plan: a plan by whose evidence head the trained model answers too, or None.
        controls: whether to answer from other tokens in the same number too, if the plan takes masks.
        budgets: shares of the visual tokens, 0..1, at which own boxes, random, centre, inverted and oracle compete.
        limit: number of questions per file, from its start; None: all.
        bootstrap_samples: number of resamples per interval.
        load: options of `SparseVLM.from_pretrained`, the same for all models, so that they see the same pixels.
        cache: folder of an embedding cache that fits the encoders of all models, or None.
        plan: plan by which the models answer; None: the checkpoint's own.
        text_only: whether to ask with a blank image too; None: if a data set has questions without options.
        judge: a model that grades answers in words next to the rule, or None.
        metrics: names of measures of text for answers in words (`vitos.eval.metrics`).
    """

    name: str
    checkpoint: str
    data: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)
    base: str | None = None
    rl_dense: str | None = None
    head_plan: str | None = None
    controls: bool = True
    budgets: tuple[float, ...] = ()
    limit: int | None = None
    bootstrap_samples: int = 10_000
    load: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    plan: str | None = None
    text_only: bool | None = None
    judge: JudgeSection | None = None
    metrics: tuple[str, ...] = ()


def evaluate(
    evaluation: Evaluation,
    out: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    recipe: Recipe | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer all questions, write `results.json`, `cases.jsonl` and `report.html` to `out`, print the table.

    Answers are appended to `out/answers/…` as they come; a second call asks only what is missing.

    >>> from vitos.data.phantom import write_phantoms
    >>> with TemporaryDirectory() as folder:
    ...     data = write_phantoms(Path(folder), "test", 2)
    ...     asked = Evaluation(name="nano", checkpoint="nano", data=(str(data),), controls=False, bootstrap_samples=10)
    ...     results = evaluate(asked, Path(folder, "out"), console=Console(quiet=True))
    ...     sorted(path.name for path in Path(folder, "out").iterdir())
    ['answers', 'cases.jsonl', 'report.html', 'results.json']

    Args:
        metrics: rows of the training run's `metrics.jsonl`, for the report.
        recipe: recipe of the training run; with it the model card is written too.
        console: where the table is printed.

    Raises:
        ValueError: for a plan that leaves no tokens out, and for budgets under a plan that takes no masks.
    """
    console = console or Console()
    check_metrics(evaluation.metrics)
    judge = Judge(evaluation.judge) if evaluation.judge is not None else None
    spec = VitosSpec.load(resolve_model_path(evaluation.checkpoint)) or VitosSpec()
    spec = dataclasses.replace(spec, plan=evaluation.plan or spec.plan)
    sets = [read_set(source, evaluation.limit) for source in evaluation.data]
    in_words = any(record.kind != "letter" for one in sets for record in one.records)
    text_only = in_words if evaluation.text_only is None else evaluation.text_only
    models = _models(evaluation, spec, text_only)
    folder = out / "answers" / _fingerprint(evaluation, spec.plan, models, sets)
    run_models(models, sets, evaluation.settings, folder, cache=evaluation.cache)
    asked: dict[str, Any] = {
        "name": evaluation.name,
        "seed": evaluation.settings.seed,
        "checkpoint": evaluation.checkpoint,
        "base": evaluation.base,
        "plan": spec.plan,
        "head_plan": evaluation.head_plan,
        "bootstrap_samples": evaluation.bootstrap_samples,
        "models": [model.name for model in models],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "metrics": list(evaluation.metrics),
    }
    if judge is not None and in_words:
        asked["judge"] = grade_answers(folder, asked["models"], judge)
    elif (folder / GRADES).is_file():  # grades of an earlier call stay
        asked["judge"] = json.loads((folder / ASKED).read_text(encoding="utf-8")).get("judge")
    write_json_atomic(folder / ASKED, asked)
    results = score(folder, out, metrics)
    if recipe is not None:
        card = model_card(results, dataclasses.asdict(recipe), evaluation.base or recipe.model.path)
        try:
            write_text_atomic(Path(evaluation.checkpoint) / "README.md", card)
        except OSError as error:
            _log.warning("the model card could not be written (%s); the results are in %s", error, out)
    console.print(results_table(results))
    if hint := _hint(results):
        console.print(hint)
    console.print(f"Report: {out / REPORT}")
    return results


def _hint(results: Mapping[str, Any]) -> str:
    """What to do about a model that does not answer in the form that is asked for; empty where most can be read."""
    unread = results["no_answer_rate"] or 0.0
    if unread < MOST_UNREAD:
        return ""
    return (
        f"{unread:.0%} of the answers could not be read: the model does not know the form that it is to answer in. "
        "Reinforcement learning cannot teach it what it never does; a supervised start does "
        "(warm_start in the recipe, docs/training.md)."
    )


def cases_in_memory(policy: SparseVLM, records: Sequence[Record], settings: Settings) -> list[dict[str, Any]]:
    """The cases of a policy that is in memory, with its controls; nothing stays on disk."""
    with TemporaryDirectory() as out:
        conditions = control_conditions(controls=policy.plan.takes_masks)
        model = AskedModel(name=TRAINED, path="", conditions=conditions, load=lambda: policy)
        run_models([model], [EvalSet("records", tuple(records))], settings, Path(out))
        return cases_of(EvalFolder(Path(out)), [TRAINED])


def score(folder: Path, out: Path, metrics: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Make all figures from stored answers and write them to `out`, without a model.

    Args:
        folder: folder `answers/<fingerprint>` of an evaluation.
        out: folder of the figures and the report.
        metrics: rows of the training run's `metrics.jsonl`, for the report.
    """
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    stored, models = EvalFolder(folder), asked["models"]
    cases = cases_of(stored, models)
    samples = asked["bootstrap_samples"]
    results = {
        **{key: asked[key] for key in ("name", "seed", "checkpoint", "base", "plan", "command")},
        "dataset": ", ".join(stored.manifest()["benchmarks"]),
        "vitos_version": __version__,
        "answers": os.path.relpath(folder, out),
        **summarize(cases, bootstrap_samples=samples, seed=asked["seed"], metrics=asked.get("metrics", ())),
        **({"judge": asked["judge"]} if asked.get("judge") else {}),
        "left_out": stored.left_out(models[0]),
        "seconds_by_stage": _seconds(stored, asked, len(cases)),
    }
    for case in cases:
        case["image"] = os.path.relpath(case["image"], out)
    with atomic_write(out / CASES) as path:
        path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    write_json_atomic(out / RESULTS, results)
    write_report(out, results, cases, metrics)
    return results


def _models(evaluation: Evaluation, spec: VitosSpec, text_only: bool) -> list[AskedModel]:
    """The trained model with all its conditions, then the models that it is compared with."""
    plan, budgets, controls = get_plan(spec.plan), evaluation.budgets, evaluation.controls
    if not plan.drops:
        others = ", ".join(name for name in PLANS.names() if get_plan(name).drops)
        raise ValueError(f"every evaluation answers by plan {plan.name} as well; choose one of {others}")
    if budgets and plan.takes_masks and not plan.localizes:
        raise ValueError(
            f"budgets cut or widen boxes, and plan {plan.name} writes none; compare it at budgets with "
            f"`vitos bench run --selector {plan.name}`"
        )
    if budgets and not plan.takes_masks:
        raise ValueError(
            f"budgets choose among the tokens of one image, and plan {plan.name} encodes it twice; leave them out"
        )

    def model(name: str, path: str, conditions: tuple[str, ...], own: VitosSpec | None) -> AskedModel:
        load = partial(SparseVLM.from_pretrained, path, spec=own, **evaluation.load)
        return AskedModel(name=name, path=path, conditions=conditions, load=load)

    conditions = control_conditions(budgets, controls=controls and plan.takes_masks, text_only=text_only)
    models = [model(TRAINED, evaluation.checkpoint, conditions, spec)]
    if evaluation.base:
        base = VitosSpec.load(resolve_model_path(evaluation.base))
        able = plan.localizes or (base is not None and base.evidence_head is not None)
        asked = (*((LOCALIZE, OWN_BOXES) if able else ()), DENSE, *([BLANK] if text_only else ()))
        own = spec if able else dataclasses.replace(spec, plan="two_pass")  # of which no answer is asked
        models.append(model(BASE, evaluation.base, asked, own))
    if evaluation.rl_dense:
        models.append(model(RL_DENSE, evaluation.rl_dense, (DENSE,), None))
    if evaluation.head_plan:
        by_head = dataclasses.replace(spec, plan=evaluation.head_plan)
        models.append(model(HEAD, evaluation.checkpoint, (OWN_BOXES,), by_head))
    return models


def _fingerprint(evaluation: Evaluation, plan: str, models: Sequence[AskedModel], sets: Sequence[EvalSet]) -> str:
    """A short name for everything that an answer depends on."""
    parts = [
        plan,
        sorted((name, str(value)) for name, value in evaluation.load.items()),
        evaluation.settings.told(),
        [(model.name, model.path, model.weights) for model in models],
        [(one.name, questions_fingerprint(one.records)) for one in sets],
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def _seconds(folder: EvalFolder, asked: Mapping[str, Any], questions: int) -> dict[str, float | None]:
    """Seconds per question of each span of the two passes, their total, and those of the other models' one pass."""
    models, whole = asked["models"], ("images", DENSE)
    spent = _spent(folder, TRAINED, ("images", LOCALIZE, OWN_BOXES), asked["plan"])
    dense = sum(_spent(folder, BASE, whole, "dense").values()) if BASE in models else None
    head = sum(_spent(folder, HEAD, ("images", OWN_BOXES), asked["head_plan"]).values()) if HEAD in models else None
    seconds: dict[str, float | None] = {name: value / questions for name, value in spent.items()}
    return seconds | {
        "total": sum(spent.values()) / questions,
        "dense_total": None if dense is None else dense / questions,
        **({} if head is None else {"evidence_head_total": head / questions}),
    }


def _spent(folder: EvalFolder, model: str, conditions: Sequence[str], plan: str) -> dict[str, float]:
    """Seconds of each span of some conditions, over all questions; the opening of files is left out."""
    spent = dict.fromkeys(SPANS, 0.0)
    # Under a plan that begins with a reduced image, the whole images were encoded for the dense condition.
    shared = ("prefix",) if get_plan(plan).reduced else ("vision", "prefix")
    for name in folder.manifest()["benchmarks"]:
        for row in folder.times(model, name):
            wanted = shared if row["condition"] == "images" else SPANS
            for span, value in row["seconds"].items():
                if row["condition"] in conditions and span in wanted:
                    spent[span] += value
    return spent
