"""The demo's folder: what people upload lies in it, so nobody else can read it, and it goes when the demo does."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end the demo: from Ctrl+C, from `kill` or a service manager, and from a closed terminal."""
PAGES = "pages"
"""Name of the folder for uploads and pictures within the private one."""
ATTEMPTS = 20


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder with mode 0700; it is removed at the end, also when a signal of `ENDINGS` ends the demo.

    Gradio takes its folder from the environment, in part when it is imported: import it within this context. Its
    default folder is one for all users of the machine.

    Only the main thread may call this, since no other can receive signals. A process that is killed (SIGKILL) or loses
    its power leaves the folder behind.
    """
    before = {number: signal.signal(number, _interrupt) for number in ENDINGS}
    folder = Path(tempfile.mkdtemp(prefix="vitos-demo-")).resolve()
    try:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / PAGES)
        yield folder
    finally:
        _ignore_signals()
        del os.environ["GRADIO_TEMP_DIR"]
        _remove(folder)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    _ignore_signals()  # a second one must not stop the removal
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of the demo may still write; these cannot make it again once it is gone.

    Raises:
        OSError: if it cannot be removed after several attempts.
    """
    for attempt in range(ATTEMPTS):
        try:
            shutil.rmtree(folder)
            return
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError:
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(0.1)
