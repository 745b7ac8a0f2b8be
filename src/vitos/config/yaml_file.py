"""The file of a recipe: a strict YAML dialect, `--set` overrides, and every problem as one plain line.

The keys of a recipe are defined in `vitos.config.recipe`. Importable without torch, transformers or NumPy.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import yaml
from pydantic_core import ErrorDetails

# Type of the pydantic error that reports a dataclass's rules; its context holds `problems`, (field, message) pairs.
RULES = "rules"


class ConfigError(ValueError):
    """A recipe cannot be used. `problems` holds one line per problem, which begins with its dotted key."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {line}" for line in problems))


def parse_yaml(text: str) -> Any:
    """Read one YAML document, safe types only. A key given twice is an error, and `2e-6` is a number.

    Raises:
        yaml.YAMLError: for anything else; names line and column.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Plain containers as YAML, in the given order, tuples as lists. `parse_yaml` of it gives them back."""
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


def override(values: dict[str, Any], text: str) -> Iterator[str]:
    """Set one "dotted.key=value" in `values`; the value is YAML. Yields what is wrong with it."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        yield f"--set {text}: write it as dotted.key=value, such as train.learning_rate=2e-6"
        return
    section = values
    for i, part in enumerate(parts[:-1]):
        inner = section.get(part)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            yield f"--set {text}: {'.'.join(parts[: i + 1])} is a single value without keys; set it as a whole"
            return
        section[part] = section = inner
    try:
        section[parts[-1]] = parse_yaml(value)
    except yaml.YAMLError as error:
        yield f"--set {text}: the value is not valid YAML: {error}"


def explain(errors: Iterable[ErrorDetails], root: type, prefix: tuple[str, ...] = ()) -> list[str]:
    """Pydantic's errors as lines "dotted.key: what is wrong and what to do".

    Args:
        errors: the list that `ValidationError.errors()` gives.
        root: dataclass of the recipe; its keys are suggested for unknown ones.
        prefix: keys from `root` down to the part that was validated.
    """
    return [line for error in errors for line in _explain(error, root, prefix)]


def _explain(error: ErrorDetails, root: type, prefix: tuple[str, ...]) -> Iterator[str]:
    kind, got = error["type"], f"got {reprlib.repr(error['input'])}"
    key = ""
    for part in (*prefix, *error["loc"]):
        key += f"[{part}]" if isinstance(part, int) and kind != "invalid_key" else f".{part}" if key else str(part)
    if kind == RULES:
        yield from (f"{key}.{name}".lstrip(".") + f": {message}" for name, message in error["ctx"]["problems"])
    elif kind in ("missing", "missing_argument"):
        yield f"{key}: is required"
    elif kind == "unexpected_keyword_argument":
        yield f"{key}: unknown key{_suggest(key, root)}"
    elif kind == "invalid_key":
        yield f"{key}: keys must be text; put it in quotes"
    elif kind in ("dataclass_type", "dict_type"):
        yield f"{key}: must be a mapping of keys to values, {got}"
    else:
        message = error["msg"].removeprefix("Value error, ").replace("Input should ", "must ")
        yield f"{key}: {message.replace('String should ', 'must ')}, {got}"


def _suggest(unknown: str, root: type) -> str:
    """The end of a message about an unknown key: the same name in another section, or the nearest name."""
    parent, _, leaf = re.sub(r"\[\d+\]", "[]", unknown).rpartition(".")
    # `train` first: it has most of the keys that people set.
    keys = sorted(_all_keys(root), key=lambda key: not key.startswith("train."))
    leaves = {key: key.rpartition(".")[2] for key in keys}
    siblings = {key: name for key, name in leaves.items() if key.rpartition(".")[0] == parent}
    found = [key for key, name in leaves.items() if name == leaf]
    for candidates, cutoff in ((siblings, 0.6), (leaves, 0.75)):
        if not found:
            nearest = difflib.get_close_matches(leaf, list(candidates.values()), n=1, cutoff=cutoff)
            found = [key for key, name in candidates.items() if name in nearest]
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return "; other fields of transformers.TrainingArguments go under trainer" if parent == "train" else ""


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a dataclass, with `[]` for an index."""
    hints = get_type_hints(section)
    for name in (f.name for f in dataclasses.fields(section)):
        yield prefix + name
        hint = hints[name]
        index = "[]" if getattr(hint, "__origin__", None) is tuple else ""
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from _all_keys(inner, f"{prefix}{name}{index}.")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice; keep one", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # no anchors for a value that occurs twice


# YAML 1.1 reads 2e-6 as text, because it has no dot; whoever writes it means a number.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
