"""What the verbs of the command line share: where they print, and their progress bars."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import Progress, TaskID

console = Console()


def advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def quiet() -> None:
    """Leave the screen to our own bars and tables; transformers' errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
