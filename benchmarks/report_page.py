"""Size and first paint of report.html by its number of cases, in the system's Chromium.

Cases are drawn: a grid of 32 x 32 tokens, gold boxes, four conditions with thoughts of 60 words each and their own
kept tokens. So nothing repeats that a real report would not repeat. All share one image.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from vitos.reports.html import write_report

CONDITIONS = ("dense", "sparse", "random", "oracle")
WORDS = ("lesion", "in", "left", "lung", "round", "larger", "than", "right", "with", "bright", "rim", "near", "heart")
TOKENS, KEPT = 1024, 120


def drawn_cases(count: int, folder: Path) -> list[dict[str, Any]]:
    """`count` cases; their image is written into `folder`."""
    Image.effect_noise((224, 224), 40).convert("RGB").save(folder / "image.png")
    rng, cases = random.Random(0), []
    for number in range(count):
        conditions = {}
        for name in CONDITIONS:
            answer = rng.choice("AB")
            text = f"<think>{' '.join(rng.choices(WORDS, k=60))}</think><answer>{answer}</answer>"
            conditions[name] = {
                "text": text, "answer": answer, "correct": answer == "B", "fallback": False,
                "kept": sorted(rng.sample(range(TOKENS), KEPT if name != "dense" else TOKENS)),
            }  # fmt: skip
        cases.append({
            "id": f"case/{number}", "template": rng.choice(("count", "where", "larger")), "image": "image.png",
            "question": f"<image>Question {number}: {' '.join(rng.choices(WORDS, k=8))}?\nA. yes\nB. no",
            "gold": "B", "gold_boxes": [[0.1, 0.1, 0.4, 0.5]],
            "grid": [{"rect": [0, 0, 1, 1], "rows": 32, "cols": 32}], "conditions": conditions,
        })  # fmt: skip
    return cases


def measure(
    count: int, folder: Path, loads: int = 7, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, float]:
    """Write a report of `count` cases into `folder` and load it.

    Returns:
        megabytes of the file, and milliseconds from the start of navigation to the first paint and to the filled
        table, each the median of `loads`.

    Raises:
        FileNotFoundError: if there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise FileNotFoundError("there is no chromium on this machine: apt install chromium")
    cases = drawn_cases(count, folder)
    conditions = {
        name: {"num_questions": count, "accuracy": 0.5, "ci": [0.4, 0.6], "kept_ratio": 0.12} for name in CONDITIONS
    }
    write_report(folder, {"name": "drawn", "seed": 0, "num_questions": count, "conditions": conditions}, cases)
    page_file, paints, tables = folder / "report.html", [], []
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for number in range(loads):
            page = chromium.new_page(viewport={"width": 1280, "height": 800})
            page.goto(page_file.as_uri())
            page.locator("#shown", has_text="cases)").wait_for()
            tables.append(page.evaluate("performance.now()"))
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            page.close()
            progress(number + 1, loads)
        chromium.close()
    return {"megabytes": page_file.stat().st_size / 1e6, "paint_ms": median(paints), "table_ms": median(tables)}
