"""docs/your-data.md, followed by its own commands in a fresh folder: about 80 seconds of one core."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def follow(folder, language, block):
    """Do what one block of the page says."""
    if language == "yaml":
        (folder / "mine.yaml").write_text(block)
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    # The only change: the demo waits for a browser; its own tests open it.
    lines = [line for line in block.splitlines() if not line.startswith("vitos demo")]
    script = "\n".join(lines).replace("vitos ", f"{sys.executable} -m vitos ") if language == "bash" else block
    command = ["bash", "-ec", script] if language == "bash" else [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_twelve_pictures_and_a_spreadsheet_become_a_model_above_chance(tmp_path):
    assert [language for language, _ in BLOCKS] == ["python", "python", "bash", "yaml", "bash", "bash"]
    for language, block in BLOCKS:
        follow(tmp_path, language, block)
    train = json.loads((tmp_path / "train.json").read_text())
    assert len({record["image_path"][0] for record in train}) == 12
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["num_questions"] == 80  # each about another picture that was not trained on
    low, high = results["conditions"]["sparse"]["ci"]
    assert 0.5 < low < high, f"chance is not excluded: {low:.3f} to {high:.3f}"
    assert results["no_answer_rate"] == 0
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "answer.png").is_file()
