"""One training step at a time, in a process of its own: what `python -m benchmarks train` compares.

    python -m benchmarks.train_worker JOB.json

Four ways to make the same step, on the same random weights, questions, numbers and lengths of completions:

- `shared`: `DualStreamTrainer` as users run it.
- `own prompts`: the same trainer on an engine that runs every completion with a prompt of its own, in sampling and in
  scoring. Like the next, a reference for this measurement, slow on purpose.
- `unshared`: every sharing off. A localization is scored once for every pair that it stands in, too: K times.
- `trl`: TRL's `GRPOTrainer`. It knows no dual stream, so it gets each question's localization prompt once and its
  reasoning prompt K times, G completions each: G + G·K completions, as the dual stream has.

Both branches are trained (`schedule: joint`), since GRPO trains all that it samples. Random weights write no box, so
every reasoning prompt is dense: the most that the dual stream can cost, and all that TRL can run. Completions have a
fixed length: no token stops them.

The process writes "@step" and a JSON object for every turn of two steps, the second of which counts, and waits for a
line before each, so that processes that are compared take turns on the same cores.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.train_shapes import SHAPES, random_image
from benchmarks.train_turns import Job, Meter


def main() -> None:
    """Run the job that the command line names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        shape = SHAPES[job.shape]
        policy = shape.build()
        images = [random_image(Path(folder), i, shape.side) for i in range(job.questions)]
        if job.way == "trl":
            from benchmarks.train_trl import run
        else:
            from benchmarks.train_dual import run
        run(job, policy, images, Meter(), Path(folder) / "run")


if __name__ == "__main__":
    main()
