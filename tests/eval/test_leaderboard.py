"""The leaderboard of stored answers against figures counted by hand."""

import numpy as np
import pytest
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.eval.leaderboard import boards, leaderboard_sheet
from vitos.eval.store import FORMAT, EvalFolder

QUESTIONS = 40
RIGHT = {  # number of right answers by seed: dense, and a selector and random tokens at two budgets
    "seed0": {"dense": 30, "random@0.1": 10, "divprune@0.1": 34, "random@0.5": 28, "divprune@0.5": 28},
    "seed1": {"dense": 32, "random@0.1": 8, "divprune@0.1": 36, "random@0.5": 26, "divprune@0.5": 27},
}


@pytest.fixture
def stored(tmp_path):
    """A folder with answers of two seeds; the selector has no answer to the last question at 50 %."""
    out = EvalFolder(tmp_path / "phantom")
    conditions = list(RIGHT["seed0"])
    records = [Record(f"q{i}", (), "<image>?\nA. cyst\nB. mass", "A", (Box(0, 0, 1, 1),)) for i in range(QUESTIONS)]
    manifest = {
        "format": FORMAT,
        "vitos_version": "0",
        "settings": {"seed": 0},
        "models": {name: {"path": name, "weights": name} for name in RIGHT},
        "benchmarks": {"phantom": {"questions": QUESTIONS}},
        "conditions": conditions,
    }
    out.open_run(manifest, {"phantom": records})
    for model, right in RIGHT.items():
        for condition in conditions:
            rows = [
                {
                    "id": record.id,
                    "condition": condition,
                    "text": f"<answer>{'A' if i < right[condition] else 'B'}</answer>",
                    "kept": {"0.1": 1, "0.5": 5}.get(condition.partition("@")[2], 10),
                    "total": 10,
                }
                for i, record in enumerate(records)
            ]
            if condition == "divprune@0.5":
                rows[-1] = {"id": records[-1].id, "condition": condition, "text": None}
            out.append("answers", model, "phantom", 0, rows)
    return out.path


def test_seeds_are_averaged_and_compared_with_random(stored):
    (board,) = boards([stored], seeds=True, samples=2000)
    best, level = board.places["divprune"][0.1], board.places["divprune"][0.5]
    assert best.accuracy.estimate == pytest.approx(70 / 80)
    assert best.over_random.estimate == pytest.approx(52 / 80)
    assert best.over_random.verdict == "above"
    assert (best.num_questions, level.num_questions) == (QUESTIONS, QUESTIONS - 1)
    assert level.over_random.verdict == "undecided"
    assert board.places["random"][0.1].over_random is None
    assert board.places["dense"][1.0].accuracy.estimate == pytest.approx(62 / 80)
    alone = [boards([stored], samples=500)[i].places["divprune"][0.1].accuracy.estimate for i in (0, 1)]
    np.testing.assert_allclose(alone, [34 / 40, 36 / 40])


def test_the_best_comes_first_and_marks_say_what_was_seen(stored):
    sheet = leaderboard_sheet(boards([stored], seeds=True, samples=2000)[0])
    assert [row[0] for row in sheet.rows] == ["All tokens", "DivPrune", "Random"]
    assert sheet.columns == ("Tokens", "All", "10.0%", "50.0%")
    top = sheet.rows[1]
    assert top[2].startswith("87.5% (")
    assert top[2].endswith(" ▲")
    assert top[3].endswith(f", n = {QUESTIONS - 1}")
    assert "▲" not in "".join(sheet.rows[2])
    assert "10.0%: " in sheet.note


def test_the_command_writes_both_files(stored, tmp_path):
    done = CliRunner().invoke(app, ["bench", "leaderboard", str(stored), "--seeds", "--out", str(tmp_path / "board")])
    assert done.exit_code == 0, done.output
    assert "| DivPrune |" in (tmp_path / "board/leaderboard.md").read_text(encoding="utf-8")
    assert "DivPrune" in (tmp_path / "board/leaderboard.html").read_text(encoding="utf-8")


def test_budgets_that_nobody_asked_are_an_error(stored):
    with pytest.raises(ValueError, match=r"holds no selector at 0\.33 of the tokens"):
        boards([stored], [0.33])
