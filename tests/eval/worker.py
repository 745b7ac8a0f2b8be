"""One process of a bench: python worker.py JOB.json. With WORLD_SIZE set, one of several."""

import faulthandler
import json
import sys
from pathlib import Path

from vitos.eval.bench import read_sets, run_bench
from vitos.eval.conditions import Settings


def run(job):
    settings = Settings(**job["settings"])
    run_bench(job["models"], read_sets(job["data"], []), job["conditions"], settings, Path(job["out"]))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    run(json.loads(Path(sys.argv[1]).read_text()))
