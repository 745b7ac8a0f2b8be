"""What many questions about one image cost, beside one question: `python -m benchmarks questions`.

Both from pixels, with given evidence and texts of fixed length as in `inference.py`. The many are asked together about
one scan; the answers are then compared with those of every question asked alone about a scan of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from scripts.nano_model import NANO_SPEC

from benchmarks.inference import answer_told, device_name, middle, noise
from benchmarks.inference_models import build_model
from benchmarks.tables import pipe_table
from vitos.core.geometry import Box
from vitos.core.stopwatch import Stopwatch
from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.policy.plans import Limits, Outcome, get_plan
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

JSON_FILE, TABLE = "questions.json", "questions.md"
_PLACES = ("upper left", "upper right", "lower left", "lower right")
_KINDS = ("cyst", "mass", "nodule")


@dataclass(frozen=True)
class Questions:
    """What is measured.

    Attributes:
        model, parts, dtype, device: as in `build_model`.
        plans: names of plans.
        size: width and height of the image in pixels.
        kept: share of the visual tokens that the evidence covers, 0..1.
        count: questions about the image, at most 24.
        runs: timed runs of each; one more before them warms up.
        evidence_tokens, reasoning_tokens: written by the two branches.
    """

    model: str = "nano"
    parts: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    plans: tuple[str, ...] = ("two_pass", "gather")
    size: int = 512
    kept: float = 0.25
    count: int = 10
    runs: int = 3
    evidence_tokens: int = 16
    reasoning_tokens: int = 64

    def __post_init__(self) -> None:
        for name in self.plans:
            get_plan(name)
        if not 1 <= self.count <= 24 or self.runs < 1 or not 0 < self.kept <= 1:
            raise ValueError("questions must be 1 to 24, runs >= 1 and the kept share in (0, 1]")


def run_questions(asked: Questions, progress: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Measure all plans; `ratio` is the time of all questions over that of one, median, least and greatest."""
    device = torch.device(asked.device)
    backbone, said = build_model(asked.model, asked.parts, getattr(torch, asked.dtype), device)
    backbone.stop_token_ids = ()  # texts of fixed length
    picture = noise(asked.size, 0)
    (view,) = backbone.layout(picture)[0].views
    vlm, box = SparseVLM(backbone, NANO_SPEC), middle(view.cols, asked.kept)
    texts = [question(i) for i in range(asked.count)]
    cases = {}
    for plan in asked.plans:
        pairs: list[tuple[float, float]] = []
        for run in range(asked.runs + 1):
            progress(f"{plan}: run {run} of {asked.runs}" if run else f"{plan}: warming up")
            one, _ = _ask(vlm, picture, texts[:1], plan, box, asked)
            many, together = _ask(vlm, picture, texts, plan, box, asked)
            pairs.append((one, many))
        progress(f"{plan}: every question alone")
        alone = [_ask(vlm, picture, [text], plan, box, asked)[1][0] for text in texts]
        ratios = [many / one for one, many in pairs[1:]]
        cases[plan] = {
            "seconds_of_one": median(one for one, _ in pairs[1:]),
            "seconds_of_all": median(many for _, many in pairs[1:]),
            "ratio": [median(ratios), min(ratios), max(ratios)],
            "same_texts": sum(_written(a) == _written(b) for a, b in zip(together, alone, strict=True)),
            "distinct_texts": len({found.reasoning.completion.text for found in alone}),
        }
    machine = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**asdict(asked), "said": said, **machine, "visual_tokens": view.rows * view.cols, "cases": cases}


def question(index: int) -> str:
    """One of 24 different questions."""
    place, first = _PLACES[index % 4], index // 4 % 3
    options = [*_KINDS[first:], *_KINDS[:first]]
    asked = "What is in" if index < 12 else "Which kind is in"
    return f"<image>{asked} the {place} quadrant?\nA. {options[0]}\nB. {options[1]}"


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    count = results["count"]
    lines = [
        f"{results['said']}; {results['size']} px, {results['visual_tokens']} visual tokens, {results['kept']:.0%} "
        f"kept, {results['evidence_tokens']} + {results['reasoning_tokens']} tokens written, {results['dtype']} on "
        f"{results['device']}, {results['threads']} threads, PyTorch {results['torch']}; medians of {results['runs']} "
        "paired runs from pixels to answers (range of pairs).",
        "",
    ]
    columns = (
        "plan",
        "1 question, s",
        f"{count} questions, s",
        f"{count} ÷ 1",
        "answers as alone",
        "different answers",
    )
    rows = [
        (
            plan,
            f"{case['seconds_of_one']:.2f}",
            f"{case['seconds_of_all']:.2f}",
            "{:.2f} ({:.2f}–{:.2f})".format(*case["ratio"]),
            f"{case['same_texts']} of {count}",
            str(case["distinct_texts"]),
        )
        for plan, case in results["cases"].items()
    ]
    lines += pipe_table(columns, rows)
    return "\n".join(lines) + "\n"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """`questions.json` and `questions.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / JSON_FILE, results)
    write_text_atomic(folder / TABLE, markdown(results))


def _ask(
    vlm: SparseVLM, picture: Image.Image, texts: list[str], plan: str, box: Box, asked: Questions
) -> tuple[float, list[Outcome]]:
    """Seconds from pixels to answers, and the outcomes."""
    limits = Limits(max_tokens=asked.reasoning_tokens, max_evidence_tokens=asked.evidence_tokens)
    watch = Stopwatch()
    with watch.span("all"):
        scan = vlm.encode(picture, plan=plan)
        queries = [Query.about(scan, text) for text in texts]
        outcomes = answer_told(vlm, get_plan(plan), queries, box, limits, Stopwatch())
    return watch.seconds["all"], outcomes


def _written(found: Outcome) -> list[list[int]]:
    """The tokens of its branches."""
    return [r.completion.token_ids.tolist() for r in (found.localization, found.reasoning) if r is not None]
