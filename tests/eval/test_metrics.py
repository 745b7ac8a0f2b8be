"""Measures of text: against the libraries' published examples, and a plug-in from docs/metrics.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitos.eval.metrics import METRICS, MetricError, check_metrics, measure
from vitos.eval.open_answers import open_figures

ROOT = Path(__file__).resolve().parents[2]


def test_measures_are_found_by_their_files():
    assert {"bleu", "rouge"} <= set(METRICS.names())


def test_bleu_is_papineni_by_hand():
    """One answer of six words, five in the reference in a row: p1..p4 = 5/6, 4/5, 3/4, 2/3, no brevity penalty."""
    pytest.importorskip("sacrebleu")
    found = measure("bleu", ["the left lung has one nodule"], [["the left lung has one cyst"]])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_bleu_takes_the_better_reference():
    pytest.importorskip("sacrebleu")
    references = [["no match at all here", "the left lung has a nodule"], ["a spleen of normal size"]]
    assert measure("bleu", ["the left lung has a nodule", "a spleen of normal size"], references)[
        "bleu"
    ] == pytest.approx(100)


def test_rouge_by_hand():
    """Three of four words each, two of three pairs; the longest common subsequence has three words."""
    pytest.importorskip("rouge_score")
    found = measure("rouge", ["left lung nodule seen"], [["left lung nodule gone", "nothing"]])
    assert found == pytest.approx({"rouge1": 3 / 4, "rouge2": 2 / 3, "rougeL": 3 / 4})


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MetricError, match=r"vitos\[report\]"):
        check_metrics(["bleu"])


def test_an_unknown_measure_lists_the_known_ones():
    with pytest.raises(ValueError, match="bleu"):
        check_metrics(["blue"])


@pytest.mark.parametrize("given", [{"x": float("nan")}, {"x": "1"}, 0.5, {"x": True}])
def test_figures_are_finite_numbers_by_name(given, monkeypatch):
    module = type("Module", (), {"measure": staticmethod(lambda answers, references: given)})
    monkeypatch.setattr(METRICS.__class__, "module", lambda self, name: module)
    with pytest.raises(MetricError, match="not finite numbers by name"):
        measure("mine", ["a"], [["a"]])


def test_the_plug_in_of_the_documents_measures_an_evaluation(tmp_path):
    """Its files as the page has them, found by their entry point in another process."""
    page = (ROOT / "docs/metrics.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "negations.py").write_text(code)
    info = tmp_path / "negations-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: negations\nVersion: 1.0\n")
    group, entry = re.search(r'\[project.entry-points."([\w.]+)"\]\n(\w+ = "[\w.]+")', page).groups()
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    script = (
        "from vitos.eval.open_answers import open_figures\n"
        "row = lambda answer: {'sparse': {'correct': False, 'score': 0.5, 'answer': answer}}\n"
        "cases = [{'kind': 'text', 'gold': 'no effusion', 'accepted': ['clear'], 'conditions': row('no effusion')},\n"
        "         {'kind': 'text', 'gold': 'no mass', 'accepted': [], 'conditions': row('a mass')},\n"
        "         {'kind': 'text', 'gold': 'a mass', 'accepted': [], 'conditions': row(None)}]\n"
        "print(open_figures(cases, samples=10, metrics=['negations'])['conditions']['sparse']['metrics'])\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
    )
    assert done.stdout.strip() == "{'negations.agreement': 0.6666666666666666}", done.stderr


def test_without_a_measure_there_is_no_table():
    case = {"kind": "text", "gold": "a", "conditions": {"sparse": {"correct": True, "score": 1, "answer": "a"}}}
    assert "metrics" not in open_figures([case], samples=10)["conditions"]["sparse"]
