"""Published benchmarks, one file each: where the rows and images of a release are, and what one row means.

Read `loading.py` first (`Benchmark`, and how a release becomes records), then `path_vqa.py` and `slake.py`. `rows.py`
reads the files of a release, `questions.py` turns its questions and answers into those of a `Record`, and
`pictures.py` finds and checks its images.

A benchmark is a file of this folder that calls `register`, or a module that an entry point of the group
`vitos.datasets` names. The file or entry point has the benchmark's name, and no list names it.
"""

from vitos.eval.datasets.loading import Benchmark, LoadedBenchmark, Release, get_benchmark, load_benchmark, register
from vitos.eval.datasets.questions import ParsedRow
from vitos.eval.datasets.rows import ReleaseRow, RowError

__all__ = [
    "Benchmark",
    "LoadedBenchmark",
    "ParsedRow",
    "Release",
    "ReleaseRow",
    "RowError",
    "get_benchmark",
    "load_benchmark",
    "register",
]
