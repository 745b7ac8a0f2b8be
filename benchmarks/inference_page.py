"""The result of `python -m benchmarks infer` as a Markdown page and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.inference import STAGES
from benchmarks.tables import pipe_table
from vitos.data.files import write_json_atomic, write_text_atomic

COLOURS = ("#4c72b0", "#dd8452", "#f2c9a8", "#8c8c8c", "#55a868", "#b9dcc2")


def write_inference(folder: Path, results: Mapping[str, Any]) -> None:
    """`inference.json`, `inference.md` and `inference.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "inference.json", dict(results))
    write_text_atomic(folder / "inference.md", inference_page(results))
    draw_inference(folder / "inference.png", results)


def inference_page(results: Mapping[str, Any]) -> str:
    """All cases as tables, what they were measured on above them."""
    first = results["cases"][0]
    text = first["dense"]["tokens"]["prefill 2"] // first["batch"] - first["tokens"]
    lines = [
        f"# What each plan costs: {results['model']}",
        "",
        f"{results['said'][0].upper()}{results['said'][1:]}; {results['dtype']} on {results['device']}, "
        f"{results['threads']} thread(s), torch {results['torch']}, vitos {results['vitos']}. "
        f"{results['evidence_tokens']} evidence tokens, {results['reasoning_tokens']} reasoning tokens, both forced; "
        f"{text} tokens of text in the reasoning prompt; one_pass drops tokens after {results['early_layers']} "
        "layers. "
        f"Medians of {results['runs']} runs. Ratios are to the dense pass of the same run, with their range. "
        "`looks`: vision and both prefills. `language`: everything but vision. "
        "KV: of the cache at the end of decoding; in brackets the dense prefix "
        "that gather holds beside it until the answer is done. Peak: the most that PyTorch held at once above the "
        "weights, in a run of its own.",
        "",
        f"Command: `{results['command']}`",
        "",
    ]
    for case in results["cases"]:
        columns = (
            "plan",
            *(f"{stage} s" for stage in STAGES),
            "looks ÷ dense",
            "language ÷ dense",
            "total ÷ dense",
            "KV MB",
            "KV ÷ dense",
        )
        lines += [
            f"## {case['size']} px ({case['tokens']} visual tokens), {case['kept']:.0%} kept, batch {case['batch']}",
            "",
        ]
        rows = []
        for plan in results["plans"]:
            row = case[plan]
            cells = [plan + " (fell back)" * row["fallback"]]
            cells += [f"{row['seconds'][stage]:.3f}" for stage in STAGES]
            cells += [_spread(row[f"{name}_ratio"]) for name in ("looks", "language", "total")]
            held = f" (+{row['prefix_bytes'] / 1e6:.1f})" if row["prefix_bytes"] else ""
            cells += [f"{row['kv_bytes'] / 1e6:.1f}{held}", f"{row['kv_ratio']:.2f}"]
            cells.append(f"{row['peak_bytes'] / 1e6:.0f}")
            rows.append(cells)
        lines += [*pipe_table((*columns, "peak MB"), rows), ""]
    return "\n".join(lines)


def draw_inference(path: Path, results: Mapping[str, Any]) -> None:
    """One panel for each case: a bar for every plan, its stages stacked."""
    from matplotlib.figure import Figure

    cases, plans = results["cases"], results["plans"]
    figure = Figure(figsize=(4 + 0.2 * len(plans), 2.4 * len(cases) + 0.6), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        start = [0.0] * len(plans)
        for stage, colour in zip(STAGES, COLOURS, strict=True):
            values = [case[plan]["seconds"][stage] for plan in plans]
            axes.barh(plans, values, left=start, color=colour, label=stage)
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.invert_yaxis()
        axes.set_title(f"{case['size']} px, {case['kept']:.0%} kept, batch {case['batch']}", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    axes.set_xlabel("seconds", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def _spread(ratio: list[float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
