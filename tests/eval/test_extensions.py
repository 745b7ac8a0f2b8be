"""A selector and a data set are one new file each: found by listing the folder or by an entry point."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vitos.eval.datasets import loading
from vitos.eval.datasets.loading import DATASETS, get_benchmark
from vitos.eval.selectors import SELECTORS, SelectorTable, base

SOURCE = Path(__file__).parents[2] / "src/vitos"

SELECTOR = '''
from vitos.eval.selectors import Choice, Task, selector
from vitos.eval.selectors.base import mask_of


@selector(title="Top rows", needs=("boxes",), rank=45, own_budget=9)
def top(task: Task, count: int) -> Choice:
    """The first rows of the image; it cannot do with fewer than eight tokens."""
    return Choice(mask_of(range(max(8, count)), task.grid.num_tokens))
'''

DATA_SET = """
from vitos.eval.datasets import Benchmark, ParsedRow, Release, register
from vitos.eval.datasets.questions import with_options
from vitos.eval.datasets.rows import csv_rows, find, text_of


def question(row):
    text, answer = with_options(text_of(row, "ask"), ["cyst", "mass"], answer=text_of(row, "right"))
    return ParsedRow(text=text, images=(text_of(row, "file"),), answer=answer, kind="letter")


BENCHMARK = register(
    Benchmark(
        name="my_set",
        hub="me/my-set",
        files=lambda split: [f"{split}.csv"],
        splits=("test",),
        release=lambda folder, split: Release(csv_rows(folder, find(folder, f"{split}.csv"))),
        question=question,
    )
)
"""

USE = """
import json, sys
from pathlib import Path
from vitos.eval.bench import read_sets, rescore, run_bench
from vitos.eval.conditions import Settings, bench_conditions
from vitos.eval.datasets.loading import load_benchmark
from vitos.eval.selectors import SELECTORS
from vitos.eval.store import EvalFolder

release, out = sys.argv[1], Path(sys.argv[2])
loaded = load_benchmark("my_set", release)
conditions = bench_conditions(["top", "random"], [0.5, 0.1], ablations=False)
settings = Settings(max_localization_tokens=4, max_reasoning_tokens=4)
run_bench({"nano": "nano"}, read_sets([], [f"my_set={release}"]), conditions, settings, out)
results = rescore(out, bootstrap_samples=20)
rows = EvalFolder(out).answers("nano", "my_set")
print(json.dumps({
    "ids": [record.id for record in loaded.records],
    "answers": [record.answer for record in loaded.records],
    "left_out": loaded.left_out,
    "order": list(SELECTORS),
    "conditions": conditions,
    "kept": [row.get("kept") for row in rows["top@0.5"].values()],
    "tokens": rows["top@0.5"]["my_set/test.csv[0]"]["tokens"],
    "over budget": [row["text"] for row in rows["top@0.1"].values()],
    "counted": results["left_out"],
    "fallback": {row["condition"]: row["fallback_rate"] for row in results["rows"]},
    "table": "Top rows, 50%" in (out / "tables.md").read_text(),
}))
"""


def install(folder, **modules):
    """Write installed modules, each with its entry point: `install(folder, name=(group, text))`."""
    for name, (group, text) in modules.items():
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}_module.py").write_text(text, encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}_module\n", encoding="utf-8")


def run(folder, code, *arguments):
    paths = os.pathsep.join([str(folder), str(SOURCE.parent)])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_a_selector_and_a_data_set_are_one_new_file_each(tmp_path):
    release = tmp_path / "release"
    release.mkdir()
    for name, colour in (("a.png", "navy"), ("b.png", "teal")):
        Image.new("RGB", (128, 128), colour).save(release / name)
    (release / "test.csv").write_text("file,ask,right\na.png,What?,mass\nb.png,What?,cyst\na.png,What?,stone\n")
    install(tmp_path / "site", my_set=("vitos.datasets", DATA_SET), my_tops=("vitos.selectors", SELECTOR))
    done = run(tmp_path / "site", USE, release, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ids"] == ["my_set/test.csv[0]", "my_set/test.csv[1]"]
    assert said["answers"] == ["B", "A"]
    ((row, reason),) = said["left_out"]
    assert row == "test.csv[2]"
    assert "not among the options" in reason
    after = said["order"].index("random")
    assert said["order"][after : after + 3] == ["random", "top", "centre"]
    assert said["conditions"] == [
        *("localize", "dense", "random@own", "top@own"),
        *("top@0.5", "random@0.5", "top@0.1", "random@0.1"),
    ]
    assert said["kept"] == [32, 32]
    assert said["tokens"] == "ff" * 4 + "00" * 4  # the first 32 of 64 tokens
    assert said["over budget"] == [None, None]  # eight tokens are more than a tenth of 64
    assert {"model": "nano", "benchmark": "my_set", "condition": "top@0.1", "num_questions": 2} in said["counted"]
    assert said["fallback"]["top@0.5"] is not None  # it needs boxes
    assert said["fallback"]["random@0.5"] is None
    assert said["table"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(name=(group, text), ...)`: as `install`, for this test in this process."""
    assert all(get_benchmark(name) for name in DATASETS.names())  # ours are registered first, and stay so
    assert len(SELECTORS) > 0
    for module in (base, loading):
        monkeypatch.setattr(module, "_REGISTERED", dict(module._REGISTERED))

    def put(**modules):
        install(tmp_path, **modules)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield put
    sys.modules.pop("mine_module", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mine_module defines no function with @selector; add it, .* entry point \(vitos\.selectors\)"),
        ("from vitos.eval.selectors.places import random", "mine_module defines no function with @selector"),
        (SELECTOR.replace("def top", "def random"), r"places and mine_module both define the selector 'random'"),
    ],
    ids=["none", "an imported one", "a name that is taken"],
)
def test_a_module_without_a_selector_of_its_own_is_named(installed, text, message):
    installed(mine=("vitos.selectors", text))
    with pytest.raises(ValueError, match=message):
        list(SelectorTable(SELECTORS._registry))


@pytest.mark.parametrize("text", ["", DATA_SET], ids=["none", "another name"])
def test_a_module_without_the_data_set_of_its_name_is_named(installed, text):
    installed(mine=("vitos.datasets", text))
    with pytest.raises(ValueError, match=r"mine_module registers no benchmark 'mine'; .* \(vitos\.datasets\)"):
        get_benchmark("mine")


def test_reading_the_names_of_data_sets_imports_none(installed):
    installed(mine=("vitos.datasets", "raise AssertionError('imported')"))
    assert {"mine", "slake"} <= set(DATASETS.names())
    with pytest.raises(ValueError, match=r"no benchmark 'other'; known are medical_bundle, .*, mine, .*, vqa_rad"):
        get_benchmark("other")
    assert get_benchmark("slake").name == "slake"


def test_a_script_registers_a_selector_after_the_first_look(installed):
    before = list(SELECTORS)
    exec(SELECTOR.replace("def top", "def late").replace("rank=45, ", ""), {"__name__": "script"})
    assert list(SELECTORS) == [*before, "late"]


def test_no_list_names_them():
    """Three names in one list are a second registry. The controls of `vitos eval` have some names of selectors."""
    names = {*SELECTORS, *DATASETS.names()}
    files = {*(SOURCE / "eval").rglob("*.py"), *(SOURCE / "cli").rglob("*.py")}
    for file in files - {SOURCE / "eval/controls.py", SOURCE / "eval/results.py"}:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else getattr(node, "keys", ())
            listed = [part.value for part in parts if isinstance(part, ast.Constant) and part.value in names]
            assert len(listed) < 3, (file, listed)
