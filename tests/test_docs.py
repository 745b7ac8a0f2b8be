"""README and docs say what the code says: names, links, commands, imports, recipe keys and result keys exist."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {"file.py:function", "my_rewards.py:short"}  # a user's files, not ours

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in found if block.strip()]


def names_in(file: Path) -> set[str]:
    """Top-level names of a Python file, and `Class.member` of its classes."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
            names |= {f"{node.name}.{ast.unparse(m.target)}" for m in node.body if isinstance(m, ast.AnnAssign)}
    return names


# --- names, links, pictures -----------------------------------------------------------------------------------------


@per_page
def test_code_and_tests_that_are_named_exist(page: Path) -> None:
    for path, mark, name in re.findall(r"`([\w./-]+\.py)(::?)([\w.]+)`", page.read_text(encoding="utf-8")):
        if f"{path}:{name}" in EXAMPLES:
            continue
        assert (mark == "::") == path.startswith("tests/"), f"{path}{mark}{name}"
        file = ROOT / path if path.startswith(("tests/", "scripts/", "benchmarks/")) else ROOT / "src/vitos" / path
        assert file.is_file(), f"{page.name} names {path}"
        assert name in names_in(file), f"{page.name} names {path}{mark}{name}"


@per_page
def test_links_resolve(page: Path) -> None:
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if not picture and not target.startswith(("http://", "https://")):
            file = page.parent / target.partition("#")[0]
            assert file.exists(), f"{page.name} links to {target}"


def test_pictures_have_an_alt_text_and_exist() -> None:
    pictures = [(page, *found) for page in PAGES for found in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose(page))]
    assert len(pictures) >= 2
    assert all(len(alt) > 20 for _, alt, _ in pictures)
    if not (ROOT / "docs/assets").is_dir():
        pytest.skip("docs/assets is made from a finished quickstart")
    assert [target for page, _, target in pictures if not (page.parent / target).is_file()] == []


def test_every_page_is_listed_and_the_readme_is_short() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 200


@per_page
def test_markers_come_in_pairs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<!-- (results:\w+) -->", text) == re.findall(r"<!-- /(results:\w+) -->", text)


# --- examples -------------------------------------------------------------------------------------------------------


@per_page
def test_commands_parse(page: Path) -> None:
    from typer.main import get_command

    for line in (line for block in blocks(page, "bash") for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
        elif words[:2] == ["python", "-m"] and words[2].startswith("studies."):
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), line
        elif words[:1] == ["python"] and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), line
        elif words:
            timing = words[:3] == ["python", "-m", "benchmarks"]
            assert timing or words[0].removeprefix(".venv/bin/") == "vitos", line
            command: Any = get_command(_app("benchmarks.__main__" if timing else "vitos.cli.main"))
            context, rest = None, words[3 if timing else 1 :]
            while True:
                context = command.make_context(command.name, list(rest), parent=context)  # fails on unknown options
                given = [*context._protected_args, *context.args]
                if not hasattr(command, "resolve_command") or not given:  # `vitos recipes` alone lists them
                    break
                _, command, rest = command.resolve_command(context, given)
            own = re.findall(r"Save this as `(.*?)`", page.read_text(encoding="utf-8"))
            assert [name for name in recipes_in(words) if not _is_recipe(name) and name not in own] == [], line


def recipes_in(words: list[str]) -> list[str]:
    """Names and paths of the recipes that a command of vitos takes."""
    if words[:2] in (["vitos", "train"], ["vitos", "recipes"]):
        return words[2 + (words[1] == "recipes") :][:1]
    return [word for before, word in pairwise(words) if before == "--recipe"]


def _is_recipe(name: str) -> bool:
    return (ROOT / name if name.startswith("recipes/") else ROOT / "recipes" / f"{name}.yaml").is_file()


def _app(module: str) -> Any:
    return importlib.import_module(module).app


@per_page
def test_python_examples_compile_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if not isinstance(node, ast.ImportFrom) or not module.startswith("vitos"):
                continue
            place = ROOT / "src" / Path(*module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            names = names_in(file) | _lazy_names(file)
            assert {alias.name for alias in node.names} <= names, f"{page.name}: {ast.unparse(node)}"


def _lazy_names(file: Path) -> set[str]:
    """Names that `vitos` loads on first use."""
    import vitos

    return set(vitos.__all__) if file == ROOT / "src/vitos/__init__.py" else set()


def test_the_yaml_examples_are_recipes(tmp_path: Path) -> None:
    from vitos.config.recipe import load_recipe

    required = {"name": "x", "output_dir": "x", "data": {"train": "x.json"}}
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert len(found) >= 2
    for block in found:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(required | yaml.safe_load(block)), encoding="utf-8")
        load_recipe(tmp_path / "recipe.yaml")


# --- keys -----------------------------------------------------------------------------------------------------------


def recipe_keys(section: type, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted key, default as YAML, or None for a section) of every key below a dataclass."""
    hints = get_type_hints(section, include_extras=False)
    for field in dataclasses.fields(section):
        key, hint = prefix + field.name, hints[field.name]
        inner = [t for t in (hint, *get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)]
        default: str | None = "required"
        if field.default_factory is not dataclasses.MISSING or field.default is not dataclasses.MISSING:
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = None if dataclasses.is_dataclass(value) else as_yaml(value)
        yield key, default
        for part in inner:
            yield from recipe_keys(part, f"{key}[]." if getattr(hint, "__origin__", None) is tuple else f"{key}.")


def as_yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else "empty" if value == "" else str(value)


def test_every_recipe_key_has_a_row_with_its_default() -> None:
    from vitos.config.recipe import Recipe

    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.\[\]]+)` \| `?([^`|]+?)`? \|", text, re.MULTILINE))
    keys = dict(recipe_keys(Recipe))
    assert len(keys) > 60
    sections = {key for key, default in keys.items() if default is None}
    for key in sections:
        assert f"`{key}`" in text
    expected = {key: default for key, default in keys.items() if default is not None}
    assert {key: rows.get(key) for key in expected} == expected
    assert set(rows) <= set(keys), "a row for a key that no longer exists"


def documented() -> set[str]:
    """Every `code` word of docs/results.md."""
    return set(re.findall(r"`([^`]+)`", prose(ROOT / "docs/results.md")))


def literal_keys(function: str) -> set[str]:
    """Text keys of the dictionaries written out in a function of `eval/evaluate.py`, and the texts of its tuples."""
    tree = ast.parse((ROOT / "src/vitos/eval/evaluate.py").read_text(encoding="utf-8"))
    (body,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    dicts = [key for node in ast.walk(body) if isinstance(node, ast.Dict) for key in node.keys]
    tuples = [item for node in ast.walk(body) if isinstance(node, ast.Tuple) for item in node.elts]
    stored = [node.slice for node in ast.walk(body) if isinstance(node, ast.Subscript)]
    found = [node.value for node in (*dicts, *tuples, *stored) if isinstance(node, ast.Constant)]
    return {value for value in found if isinstance(value, str)}


def test_keys_of_a_run_and_its_stages_are_explained() -> None:
    from vitos.eval.evaluate import SPANS

    keys = (literal_keys("score") | literal_keys("_seconds") | set(SPANS)) - {
        "dense",
        "head_plan",
        "models",
        "bootstrap_samples",
        "image",
        "open",
        "images",
        "benchmarks",
        "condition",
        "seconds",
    }
    assert {"vitos_version", "seconds_by_stage", "reason_decode", "dense_total"} <= keys
    assert keys - documented() == set()


def test_keys_of_results_and_cases_are_explained(tmp_path: Path) -> None:
    from vitos.core.record import Record
    from vitos.eval.cases import TRAINED, cases_of
    from vitos.eval.results import summarize
    from vitos.eval.store import EvalFolder

    record = Record("1", (Path("a.png"),), "?\nA. x\nB. y", "A", meta={"template": "t"})
    folder = EvalFolder(tmp_path)
    manifest = {"format": 1, "settings": {}, "models": {TRAINED: {}}, "benchmarks": {"a": {}}, "conditions": []}
    folder.open_run(manifest, {"a": [record]})
    image = {"image": "a.png", "images": [], "grid": [{"rect": [0, 0, 1, 1], "rows": 1, "cols": 2}], "shown": []}
    folder.append("images", TRAINED, "a", 0, [{"id": "1"} | image])
    answer = {"id": "1", "text": "<answer>A</answer>"}
    sparse = {"kept": 1, "total": 2, "tokens": "80"}
    rows = [answer | sparse | {"condition": f"control:{name}"} for name in ("random", "own@0.25", "random@0.25")]
    rows += [answer | sparse | {"condition": "policy@own"}, answer | {"condition": "dense"}]
    rows += [answer | {"condition": "localize", "boxes": [], "parsed": True}]
    folder.append("answers", TRAINED, "a", 0, rows)
    (case,) = cases_of(folder, [TRAINED])
    conditions = case["conditions"]
    results = summarize([case], bootstrap_samples=10)
    nested = [results["comparisons"][0], *results["by_template"].values(), *results["budgets"].values()]
    keys = {*results, *case, *conditions, *case["grid"][0], *(key for row in nested for key in row)}
    keys |= {key for row in conditions.values() for key in row}
    assert {"relative_performance_ci", "p_value", "gold_boxes", "rows", "own@0.25", "fallback"} <= keys
    assert keys - documented() == set()


def test_metrics_of_an_update_are_explained() -> None:
    import torch

    from vitos.core.geometry import Box, TokenGrid
    from vitos.core.record import Record
    from vitos.core.response import parse_localization, parse_reasoning
    from vitos.core.sparsify import Kept
    from vitos.engines.base import Completion
    from vitos.policy.types import Query, Rollout, Scan
    from vitos.rl.loss import LossOutputs
    from vitos.rl.metrics import rollout_metrics
    from vitos.rl.rewards import RewardWeights, group_rewards
    from vitos.rl.rollout import QuestionGroup

    record = Record("1", (Path("a.png"),), "?", "A", (Box(0, 0, 0.5, 0.5),))
    completion = Completion(torch.tensor([1]), torch.zeros(1), "", True)
    first, second = parse_localization("<answer>A</answer>"), parse_reasoning("<answer>A</answer>")
    group = QuestionGroup(
        record=record,
        query=Query(Scan(()), "?"),
        localizations=[Rollout(completion, first)],
        kept=[Kept.everything(TokenGrid.single(2, 2), "no box")],
        reasonings=[[Rollout(completion, second)]],
        rewards=group_rewards(record, [first], [[second]], RewardWeights()),
    )
    keys = set(rollout_metrics([group]))
    sums = {field.name for field in dataclasses.fields(LossOutputs)} - {"loss", "tokens"} | {
        "skipped_groups",
        "prompts",
    }
    keys |= {f"{name}/{branch}" for name in sums for branch in ("localization", "reasoning")}
    trainer = (ROOT / "src/vitos/rl/update.py").read_text(encoding="utf-8")
    keys |= {f"seconds/{name}" for name in re.findall(r'watch\.span\("(\w+)"\)', trainer)}
    assert {"reward/iou", "clipped/reasoning", "skipped_groups/localization", "seconds/update"} <= keys
    assert keys - documented() == set()
