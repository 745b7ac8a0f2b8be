"""Rewards that a user adds: one function in a file, named in the recipe as `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

from vitos.rl.extra import RewardError, RewardFunction


def load_reward(spec: str) -> RewardFunction:
    """Import one reward function from a file: `path/to/file.py:function`, the path relative to the working directory.

    This runs the file, which must be trusted like the rest of the recipe. Loading it again runs it again.

    Raises:
        RewardError: if the file or function does not exist, the file fails to import, or the function does not take
            (response, record).
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if path.suffix != ".py" or not name.isidentifier():
        raise RewardError(f"reward {spec!r}: expected path/to/file.py:function")
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: there is no file {path_text!r}")
    module_name = f"vitos_reward_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise RewardError(f"reward {spec!r}: {path_text!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as exc:
        del sys.modules[module_name]
        raise RewardError(f"reward {spec!r}: importing the file failed: {type(exc).__name__}: {exc}") from exc
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward {spec!r}: the file defines no function {name!r}")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as exc:
        raise RewardError(f"reward {spec!r}: it must take (response, record): {exc}") from exc
    reward: RewardFunction = function
    return reward
