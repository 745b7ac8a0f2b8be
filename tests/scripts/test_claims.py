"""The table of claims from runs made by hand: differences, undefined conditions and verdicts."""

import json

import pytest
from studies.claims.run import CLAIMS, VARIANTS, folder_of, table, verdict

from vitos.eval.seeds import SeededInterval

RIGHT = {"staged": 30, "reversed": 20, "without pruning": 10}  # of 40 questions, sparse; else as many as staged


@pytest.fixture
def runs(tmp_path):
    for variant in VARIANTS:
        for seed in range(3):
            folder = folder_of(tmp_path, variant, seed)
            folder.mkdir(parents=True)
            right = RIGHT.get(variant, 30)
            rows = []
            for i in range(40):
                names = ("sparse", "dense", "untrained_sparse", "base_dense", "random")
                conditions = {name: {"correct": i < (right if name == "sparse" else 15)} for name in names}
                conditions["localization"] = {"correct": i < right, "iou": 0.6 if i % 2 else None}
                conditions["untrained_localization"] = {"correct": False, "iou": 0.5 if i % 2 else None}
                rows.append({"id": f"q{i}", "conditions": conditions})
            order = reversed(rows) if seed else rows  # the order of a file does not count
            (folder / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    return tmp_path


def test_each_claim_has_its_difference_and_verdict(runs):
    text, rows = table(runs, range(3))
    found = {row["claim"]: row for row in rows}
    assert len(rows) == len(CLAIMS) == text.count("\n") - 2
    order = found["staged beats reversed"]
    assert (order["with"], order["without"], order["points"]) == pytest.approx((75, 50, 25))
    assert order["verdict"] == "holds"
    boxes = found["stage 1 improves the boxes (IoU)"]
    assert (boxes["points"], boxes["low"], boxes["verdict"]) == (pytest.approx(10), pytest.approx(10), "holds")
    assert found["staged beats joint"]["verdict"] == "fails"  # no difference in any question of any seed
    assert found["it beats RL without pruning, localization"]["points"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 3, "holds"), (-3, 0.4, "fails"), (-3, -1, "fails"), (-1, 2, "undecided"), (0, 0.6, "undecided")],
)
def test_verdicts(low, high, expected):
    assert verdict(SeededInterval(0, low, high, 1, 5)) == expected
