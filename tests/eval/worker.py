"""One process of a bench: python worker.py JOB.json. With WORLD_SIZE set, one of several."""

import faulthandler
import json
import sys
from pathlib import Path

from vitos.eval.command import read_sets
from vitos.eval.plan import BenchPlan
from vitos.eval.run import run_bench


def run(job):
    run_bench(job["models"], read_sets(job["data"], []), BenchPlan(**job["plan"]), Path(job["out"]))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    run(json.loads(Path(sys.argv[1]).read_text()))
