"""Run a notebook's cells from top to bottom in this process, and store what they show. Needs no Jupyter.

    python scripts/run_notebook.py notebooks/tour.ipynb

Stored are printed text, and the value of a cell's last line: a picture as PNG, anything else as text.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of this run.

    Raises:
        Exception: what a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell | _shown(cell, names, n) if cell["cell_type"] == "code" else cell for n, cell in _counted(notebook)]
    return notebook | {"cells": cells}


def _counted(notebook: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Each cell with its number among those of code, from 1."""
    count, out = 0, []
    for cell in notebook["cells"]:
        count += cell["cell_type"] == "code"
        out.append((count, cell))
    return out


def _shown(cell: dict[str, Any], names: dict[str, Any], count: int) -> dict[str, Any]:
    tree = ast.parse("".join(cell["source"]), f"cell {count}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data = {"image/png": _png(value)} if isinstance(value, Image.Image) else {"text/plain": [repr(value)]}
        row = {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}
        outputs.append(row)
    return {"outputs": outputs, "execution_count": count}


def _png(picture: Image.Image) -> str:
    picture.save(buffer := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    file = Path(sys.argv[1])
    done = run(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
