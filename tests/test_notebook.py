"""The notebook runs from top to bottom and shows what it was stored with (`jupyter execute --inplace`)."""

import base64
import io
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

FILE = Path(__file__).parent.parent / "notebooks/tour.ipynb"


def shown(notebook):
    """What each output shows: a text, or the size of a picture. Warnings on stderr are left out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                found.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size)
            elif output.get("name") != "stderr":
                found.append(output.get("text", data.get("text/plain", "")))
    return found


@pytest.mark.slow
def test_it_runs_and_shows_what_is_stored(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    kept = shown(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    again = shown(notebook)
    assert len(again) == len(kept) >= 6
    # Figures may differ in the last bit between machines; questions and pictures do not.
    assert again[0] == kept[0]
    assert [one for one in again if isinstance(one, tuple)] == [one for one in kept if isinstance(one, tuple)]
    assert "own boxes" in "".join(map(str, again))
    assert "model.safetensors" in again[-1]


def test_outputs_are_stored_and_small():
    code = [cell for cell in nbformat.read(FILE, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert FILE.stat().st_size < 200_000
    # They name folders of the machine: to be taken out after `jupyter execute --inplace`.
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
