"""What the verbs of the command line share: where they print, their progress bars, and what an extra brings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

console = Console()


def advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def quiet() -> None:
    """Leave the screen to our own bars and tables; transformers' errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which measures memory, announces itself
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def needs_extra(name: str, *modules: str) -> Iterator[None]:
    """Import inside what an extra of the package brings.

    Args:
        modules: those of the extra; what else is missing is a fault of the installation and raised as it is.

    Raises:
        RuntimeError: one of the modules is not installed; says how to.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise RuntimeError(f"vitos {name} needs {error.name}; install it with pip install 'vitos[{name}]'") from None
