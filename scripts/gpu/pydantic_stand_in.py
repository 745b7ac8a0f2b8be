"""Just enough of pydantic to import `vitos.config` on a machine that lacks it. Nothing is validated.

A borrowed machine may hold torch and transformers but not pydantic, which checks recipes. `gpu_check` reads no user's
recipe, so it may do without; its results say so.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_RULES = ("AfterValidator", "BeforeValidator", "ConfigDict", "Field", "PlainValidator", "Strict")


class _Rule:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Adapter(_Rule):
    def validate_python(self, values: Any) -> Any:
        return values


def install() -> bool:
    """Put the stand-in into `sys.modules` if pydantic is not installed; returns whether it was needed."""
    if importlib.util.find_spec("pydantic") is not None:
        return False
    error = type("ValidationError", (ValueError,), {})
    contents: dict[str, dict[str, Any]] = {
        "pydantic": {**dict.fromkeys(_RULES, _Rule), "TypeAdapter": _Adapter, "ValidationError": error},
        "pydantic_core": {"PydanticCustomError": error, "ErrorDetails": dict},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(values)
        sys.modules[name] = module
    return True
