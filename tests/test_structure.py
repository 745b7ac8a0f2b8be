"""What keeps the structure: layers, names, references, and extension by one file."""

import ast
import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/vitos"
MODULES = sorted(SOURCE.rglob("*.py"))
# Files that vitos writes, not documents of the repository.
WRITTEN = {"README.md", "tables.md", "table.md", "inference.md", "questions.md"}
# A plan is compared by its name in its own folder only.
PLAN_NAMES = sorted(
    path.stem for path in (SOURCE / "policy/plans").glob("*.py") if path.stem not in ("__init__", "base")
)


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def documents() -> set[str]:
    return {path.name for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=where)
def test_every_document_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"[\w-]+\.md\b(?!\.j2)", text)) if path != Path(__file__) else set()
    studies = {file.name for file in (ROOT / "studies").rglob("*.md")}
    assert named - documents() - WRITTEN - studies == set()
    assert not re.search(r"field_notes|[Ff]rom the issue|the case of the issue", text) or path == Path(__file__)


def test_no_public_class_name_has_two_meanings():
    found = collections.defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(where(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_the_layers_hold_and_there_is_no_cycle():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "src"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_is_short():
    packages = [path for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(packages) <= 14
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert all((path / "__init__.py").read_text(encoding="utf-8").startswith('"""') for path in packages)


@pytest.mark.parametrize("path", [p for p in MODULES if "plans" not in p.parts], ids=where)
def test_no_other_file_compares_the_name_of_a_plan(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and re.search(r"\bplan\b", ast.unparse(node)):
            texts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            assert not set(texts) & set(PLAN_NAMES), f"{where(path)}:{node.lineno}: {ast.unparse(node)}"


def test_functions_are_short():
    """None over 70 lines; median at most 6 without docstrings: where the package stood when it was renovated."""
    functions = [
        (node, f"{where(path)}:{node.name}")
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [name for node, name in functions if lines(node) > 70]
    assert not long
    code = sorted(lines(node) - (lines(node.body[0]) if ast.get_docstring(node) else 0) for node, _ in functions)
    assert code[len(code) // 2] <= 6


# --- one new file ---------------------------------------------------------------------------------------------------

PLAN = '''
"""Keep the upper half of the image, whatever the boxes."""

from vitos.core.sparsify import Kept
from vitos.policy.plans.base import Reasoning
from vitos.policy.plans.two_pass import TwoPass


class UpperHalf(TwoPass):
    def reason(self, branches, query, evidence, watch):
        kept = Kept(query.grid, query.grid.centres()[:, 1] < 0.5)
        return [Reasoning(self.prompt(branches, query, kept), kept)] * len(evidence)
'''

REWARD = '''
"""A reward that likes short answers."""


def short(response, record):
    return -len(response.text) / 1000
'''


@pytest.fixture
def package(tmp_path):
    """`package(group, name, source)`: a folder for PYTHONPATH with a module and its entry point."""

    def make(group, name, source):
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}\n")
        return tmp_path

    return make


def run(folder, *command):
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )


def test_a_plan_is_one_new_file(package, phantom_records):
    folder = package("vitos.plans", "upper_half", PLAN)
    image = str(phantom_records[0].image_paths[0])
    question = ["-m", "vitos", "ask", "nano", image, "What is it?\nA. cyst\nB. mass"]
    asked = run(folder, *question, "--plan", "upper_half")
    assert asked.returncode == 0, asked.stderr
    assert "32 of 64" in asked.stdout
    assert "upper_half" in asked.stdout
    refused = run(folder, *question, "--plan", "lower_half")
    assert refused.returncode == 2
    assert "upper_half" in refused.stderr
    recipe = ["-m", "vitos", "train", str(ROOT / "recipes/quickstart.yaml"), "--dry-run"]
    assert "plan: upper_half" in run(folder, *recipe, "--set", "sparsify.plan=upper_half").stdout


def test_a_name_that_is_taken_is_refused(package, phantom_records):
    folder = package("vitos.plans", "gather", PLAN)
    done = run(folder, "-c", "from vitos.core.registry import PLANS; PLANS.names()")
    assert "'gather' of vitos.plans has a name that is taken" in done.stderr


def test_a_reward_is_one_new_file(tmp_path):
    from vitos.core.record import Record
    from vitos.core.response import parse_reasoning
    from vitos.rl.user_rewards import load_reward

    (tmp_path / "mine.py").write_text(REWARD)
    reward = load_reward(f"{tmp_path / 'mine.py'}:short")
    assert reward(parse_reasoning("x" * 100), Record("1", (), "?", "A")) == -0.1
