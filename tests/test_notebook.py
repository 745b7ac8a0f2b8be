"""The notebook runs from top to bottom, and shows what it was stored with."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from scripts.run_notebook import run

FILE = Path(__file__).parent.parent / "notebooks/tour.ipynb"


def outputs(notebook):
    """Kind of each output → its text or picture size."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                found.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size)
            else:
                found.append("".join(output.get("text", data.get("text/plain", []))))
    return found


@pytest.mark.slow
def test_it_runs_and_shows_what_is_stored():
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    shown, kept = outputs(run(stored)), outputs(stored)
    assert len(shown) == len(kept) >= 6
    # Figures may differ in the last bit between machines; questions and pictures do not.
    assert shown[0] == kept[0]
    assert [entry for entry in shown if isinstance(entry, tuple)] == [e for e in kept if isinstance(e, tuple)]
    assert "model.safetensors" in shown[-1]
    assert "own boxes" in "".join(map(str, shown))


def test_outputs_are_stored_and_small():
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    assert FILE.stat().st_size < 200_000
    assert notebook["nbformat"] == 4


def test_an_error_in_a_cell_is_not_hidden():
    cell = {"cell_type": "code", "source": ["1 / 0"]}
    with pytest.raises(ZeroDivisionError):
        run({"cells": [cell]})
