"""Shared by the verbs of the command line: the console, progress bars, and errors about a missing extra."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

console = Console()


def advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    """Show how much of a task is done."""
    bar.update(task, completed=done, total=total)


def quiet() -> None:
    """Silence the bars and messages of other packages; errors of transformers still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which measures memory, announces itself
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def needs_extra(name: str, *modules: str) -> Iterator[None]:
    """Turn the failing import of an extra's module into an error that says how to install the extra.

    Args:
        name: name of the extra.
        modules: the modules of the extra; if another one is missing, its error is raised unchanged.

    Raises:
        RuntimeError: if one of the modules is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise RuntimeError(f"vitos {name} needs {error.name}; install it with pip install 'vitos[{name}]'") from None
