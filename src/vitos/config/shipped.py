"""The recipes that come with vitos, so that `vitos train quickstart` works from any folder.

They are `recipes/*.yaml` of the repository, and `vitos/recipes/*.yaml` in an installed package. With them come launch
configurations for `accelerate launch`, such as `accelerate/8gpu`. Importable without torch.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from vitos.config.yaml_file import parse_yaml

PACKAGE = Path(__file__).resolve().parents[1]
SUFFIX = ".yaml"
LAUNCH = "accelerate"


def shipped_folder() -> Path:
    """Folder of the recipes: the package's own, or the repository's when vitos runs from a checkout."""
    packaged = PACKAGE / "recipes"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names that `load_recipe` takes instead of a path, sorted."""
    return sorted(path.stem for path in shipped_folder().glob(f"*{SUFFIX}"))


def launch_names() -> list[str]:
    """Names of the launch configurations, sorted; they can be shown and copied, but are no recipes."""
    return sorted(f"{LAUNCH}/{path.stem}" for path in (shipped_folder() / LAUNCH).glob(f"*{SUFFIX}"))


def shipped_file(name: str) -> Path:
    """File of a shipped recipe or launch configuration.

    Raises:
        FileNotFoundError: for an unknown name; says which one may be meant.
    """
    known, word = [*recipe_names(), *launch_names()], name.removesuffix(SUFFIX)
    if word not in known:
        raise FileNotFoundError(f"no recipe is called {name!r}; {_suggestion(word, known)}")
    return shipped_folder() / f"{word}{SUFFIX}"


def find_recipe(text: str | Path) -> Path:
    """The file that is meant by a path, or by the name of a shipped recipe; a file of that path comes first.

    Raises:
        FileNotFoundError: if there is neither; says which name may be meant.
        IsADirectoryError: for a folder.
    """
    path, names = Path(text), recipe_names()
    if path.exists() and not path.is_dir():
        return path
    if str(text) in names:
        return shipped_file(str(text))
    if path.is_dir():
        raise IsADirectoryError("this is a folder; give the path of a recipe, or a name from `vitos recipes`")
    raise FileNotFoundError(f"there is no such file; {_suggestion(path.stem, names)}")


def origin_of(source: str) -> str:
    """What to do about a missing record file that a shipped recipe names; empty for any other file.

    A recipe's head gives the commands that make its data, as lines `#   vitos data …`.
    """
    wanted = os.path.normpath(source)
    for name in recipe_names():
        text = shipped_file(name).read_text(encoding="utf-8")
        data = parse_yaml(text)["data"]
        sources = [s for key in ("train", "eval") for s in _as_list(data.get(key))]
        if wanted in map(os.path.normpath, sources):
            commands = re.findall(r"^#\s+(vitos data .+?)\s*$", text, re.MULTILINE)
            if commands:
                return "make it with\n  " + "\n  ".join(commands)
            return f"see the head of a recipe that uses it: vitos recipes show {name}"
    return ""


def _as_list(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _suggestion(word: str, names: list[str]) -> str:
    if not names:
        return "this installation holds no recipes, so reinstall vitos"
    if near := difflib.get_close_matches(word.lower(), names, n=1):
        return f"did you mean {near[0]}, which comes with vitos?"
    return f"give the path of a recipe, or a name that comes with vitos: {', '.join(names)}"
