"""A bench against answers asked for one by one, killed and continued, scored again, and in two processes."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.processes import launch

from vitos.core.geometry import Box
from vitos.core.masks import random_mask
from vitos.core.sparsify import Fusion, Kept, select
from vitos.data.images import load_image
from vitos.engines.base import Sampling
from vitos.eval.bench import read_sets, rescore, run_bench
from vitos.eval.conditions import EvalSet, Settings, bench_conditions
from vitos.eval.image_ablations import blank, painted
from vitos.eval.selectors import SELECTORS, Selector, Task
from vitos.eval.store import EvalFolder
from vitos.policy.branches import Branches
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

SELECTED = ("policy", "oracle", "inverted", "random", "divprune", "tome")
BUDGETS = (1.0, 0.25)
CONDITIONS = bench_conditions(SELECTED, BUDGETS)
SETTINGS = Settings(protocol="choice", batch_size=3, max_localization_tokens=24, max_reasoning_tokens=14)


@pytest.fixture(scope="module")
def checkpoint(warm_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    warm_policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def questions(phantom_records):
    """Seven questions about six images; one has no gold boxes."""
    records = list(phantom_records[:6])
    records[4] = replace(records[4], boxes=None)
    again = replace(records[1], id="again", meta={"template": "again", "modality": "MR"})
    return EvalSet("phantoms", (*records, again), left_out=(("row 7", "no image"), ("row 9", "no answer")))


@pytest.fixture(scope="module")
def whole(checkpoint, questions, tmp_path_factory):
    """A run that was not disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run_bench({"warm": checkpoint}, [questions], CONDITIONS, SETTINGS, out)
    return out


@pytest.fixture(scope="module")
def policy(checkpoint):
    return SparseVLM.from_pretrained(checkpoint, device="cpu")


def answers(out, model="warm"):
    return EvalFolder(out).answers(model, "phantoms")


def lines(out):
    """All answers as they are in the files, sorted."""
    return sorted(line for file in (out / "answers").rglob("*.jsonl") for line in file.read_text().splitlines())


def ask(policy, record, image, mask=None, fusion=None):
    asked = policy.with_spec(fusion=fusion) if fusion else policy
    query = Query(asked.encode(image), record.question, record.kind)
    kept = Kept.everything(query.grid) if mask is None else Kept(query.grid, mask)
    prompt = asked.plan.prompt(asked.branches, query, kept)
    ((rollout,),) = asked.reason([query], [prompt], Sampling(14))
    return rollout.completion.text


def unpack(row):
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["tokens"]), np.uint8))[: row["total"]].astype(bool)


def test_every_condition_has_every_question(whole, questions):
    found = answers(whole)
    assert {*CONDITIONS} == {
        *("localize", "dense", "policy@own", "random@own", "inverted@own"),
        *(f"{name}@0.25" for name in SELECTED),
        *("blank", "shuffled", "evidence_hidden", "surroundings_hidden"),
    }
    assert all(set(rows) == {record.id for record in questions.records} for rows in found.values())


def test_answers_are_those_asked_one_by_one(whole, questions, policy):
    found, asked = answers(whole), 0
    for record in questions.records:
        image = load_image(record.image_paths[0])
        scan = policy.encode(image)
        query = Query(scan, record.question)
        ((located,),) = policy.localize([query], Sampling(24))
        localized = found["localize"][record.id]
        assert localized["text"] == located.completion.text
        assert localized["boxes"] == [list(box.as_tuple()) for box in located.response.boxes]
        selection = select(query.grid, located.response.boxes, policy.spec.keep)
        own = found["policy@own"][record.id]
        assert own["kept"] == selection.mask.sum()
        assert bool(own.get("fallback")) == selection.fallback
        assert own["text"] == ask(policy, record, image, selection.mask)
        assert found["dense"][record.id]["text"] == ask(policy, record, image)
        task = Task(policy, query, record, boxes=located.response.boxes, image=lambda image=image: image)
        for name in ("random", "divprune"):
            row = found[f"{name}@0.25"][record.id]
            mask = SELECTORS[name].choose(task, 16).mask
            np.testing.assert_array_equal(unpack(row), mask)
            fusion = Fusion("none") if name == "divprune" else None
            assert row["text"] == ask(policy, record, image, mask, fusion)
            asked += 1
        np.testing.assert_array_equal(
            unpack(found["random@0.25"][record.id]), random_mask(scan.visuals[0].grid, 16, task.rng("random"))
        )
        for name in ("random", "inverted"):
            assert found[f"{name}@own"][record.id]["kept"] == own["kept"]
    assert asked == 14


def test_positions_can_be_those_of_the_authors_code(whole, checkpoint, questions, policy, tmp_path):
    """Renumbered positions change answers from few tokens only, and answers of both kinds are not mixed."""
    conditions = bench_conditions(("divprune",), (0.1,), ablations=False)
    settings = replace(SETTINGS, positions="renumber")
    run_bench({"warm": checkpoint}, [questions], conditions, settings, tmp_path)
    found, kept = answers(tmp_path), answers(whole)
    assert {i: row["text"] for i, row in found["dense"].items()} == {i: r["text"] for i, r in kept["dense"].items()}
    renumbered = policy.with_spec(positions="renumber")
    for record in questions.records[:3]:
        row = found["divprune@0.1"][record.id]
        image = load_image(record.image_paths[0])
        assert row["text"] == ask(renumbered, record, image, unpack(row), Fusion("none"))
    with pytest.raises(ValueError, match="holds answers made with"):
        run_bench({"warm": checkpoint}, [questions], conditions, SETTINGS, tmp_path)


def test_looks_show_the_changed_picture(whole, questions, policy):
    found, by_id = answers(whole), {record.id: record for record in questions.records}
    for record in questions.records:
        image = load_image(record.image_paths[0])
        assert found["blank"][record.id]["text"] == ask(policy, record, blank(image))
        shuffled = found["shuffled"][record.id]
        other = by_id[shuffled["shown"]]
        assert other.image_paths != record.image_paths
        assert shuffled["text"] == ask(policy, record, load_image(other.image_paths[0]))
        boxes = record.boxes or found["localize"][record.id]["boxes"]
        for name, inside in (("evidence_hidden", True), ("surroundings_hidden", False)):
            row = found[name][record.id]
            if not boxes:
                assert row["text"] is None
            elif record.boxes:
                assert row["shown"] == "gold boxes"
                assert row["text"] == ask(policy, record, painted(image, record.boxes, inside=inside))
            else:
                assert row["shown"] == "own boxes"


def test_the_oracle_is_undefined_without_gold_boxes(whole, questions):
    rows = answers(whole)["oracle@0.25"]
    assert {r.id for r in questions.records if r.boxes is None} == {
        n for n, row in rows.items() if row["text"] is None
    }


@pytest.mark.parametrize("calls", [1, 24])
def test_a_killed_run_goes_on_to_the_same_answers(calls, checkpoint, questions, whole, tmp_path, monkeypatch):
    original, count = EvalFolder.append, 0

    def dying(self, kind, model, benchmark, process, rows):
        nonlocal count
        count += 1
        if count <= calls:
            return original(self, kind, model, benchmark, process, rows)
        rows = list(rows)
        original(self, kind, model, benchmark, process, rows[:1])
        file = next((self.path / kind).rglob("*.jsonl"))
        file.write_text(file.read_text()[:-9])  # in the middle of a line
        raise KeyboardInterrupt

    monkeypatch.setattr(EvalFolder, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        run_bench({"warm": checkpoint}, [questions], CONDITIONS, SETTINGS, tmp_path)
    monkeypatch.setattr(EvalFolder, "append", original)
    assert 0 < len(lines(tmp_path)) < len(lines(whole))
    run_bench({"warm": checkpoint}, [questions], CONDITIONS, SETTINGS, tmp_path)
    assert answers(tmp_path) == answers(whole)


def test_selectors_and_budgets_are_added_to_a_run(checkpoint, questions, whole, tmp_path, monkeypatch):
    small = bench_conditions(("random",), (0.25,), ablations=False)
    run_bench({"warm": checkpoint}, [questions], small, SETTINGS, tmp_path)
    assert tuple(answers(tmp_path)) == ("localize", "dense", "random@own", "random@0.25")
    before = lines(tmp_path)
    run_bench({"warm": checkpoint}, [questions], CONDITIONS, SETTINGS, tmp_path)
    assert set(before) < set(lines(tmp_path))
    mine, theirs = answers(tmp_path), answers(whole)
    assert {c: mine[c] for c in CONDITIONS} == theirs
    # Nothing is left to do: no model runs.
    monkeypatch.setattr(Branches, "encode", None)
    run_bench({"warm": checkpoint}, [questions], CONDITIONS, SETTINGS, tmp_path)


def test_a_folder_of_other_answers_is_refused(checkpoint, questions, whole):
    with pytest.raises(ValueError, match="'seed': 1"):
        run_bench({"warm": checkpoint}, [questions], CONDITIONS, replace(SETTINGS, seed=1), whole)
    with pytest.raises(ValueError, match="answers of another model 'warm'"):
        run_bench({"warm": "nano"}, [questions], CONDITIONS, SETTINGS, whole)
    other = EvalSet("phantoms", questions.records[:3])
    with pytest.raises(ValueError, match="answers of another benchmark 'phantoms'"):
        run_bench({"warm": checkpoint}, [other], CONDITIONS, SETTINGS, whole)


def test_what_a_model_cannot_follow_is_left_out_or_refused(checkpoint, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Selector, "refusal", lambda self, _: "no tome here" if self.name == "tome" else None)
    conditions = bench_conditions(("random", "tome"), BUDGETS, ablations=False)
    run_bench({"warm": checkpoint}, [questions], conditions, SETTINGS, tmp_path / "a", insist=False)
    assert "warm: left out: no tome here" in capsys.readouterr().out
    rescore(tmp_path / "a")
    rows = json.loads((tmp_path / "a" / "results.json").read_text())["rows"]
    assert {row["selector"] for row in rows} == {"dense", "random"}
    with pytest.raises(ValueError, match="no tome here"):
        run_bench({"warm": checkpoint}, [questions], conditions, SETTINGS, tmp_path / "b")


def test_a_budget_that_one_image_cannot_meet_leaves_out_that_question(checkpoint, questions, tmp_path):
    """nano's image processor makes at least four tokens: a quarter of a picture of nine tokens is less, of 64 not."""
    Image.new("RGB", (48, 48), "teal").save(tmp_path / "small.png")
    small = replace(questions.records[0], id="small", image_paths=(tmp_path / "small.png",))
    asked = EvalSet("phantoms", (questions.records[0], small, questions.records[1]))
    conditions = bench_conditions(("crop", "random"), (0.25,), ablations=False)
    run_bench({"warm": checkpoint}, [asked], conditions, SETTINGS, tmp_path / "out")
    rows = answers(tmp_path / "out")["crop@0.25"]
    assert rows["small"] == {"id": "small", "condition": "crop@0.25", "text": None}
    others = [row for name, row in rows.items() if name != "small"]
    assert len(others) == 2
    assert all(row["text"] and row["kept"] <= 16 for row in others)
    results = rescore(tmp_path / "out", bootstrap_samples=50)
    left_out = {"model": "warm", "benchmark": "phantoms", "condition": "crop@0.25", "num_questions": 1}
    assert results["left_out"] == [left_out]
    (row,) = (row for row in results["rows"] if row["condition"] == "crop@0.25")
    assert row["num_questions"] == row["vs_random"]["num_questions"] == 2
    assert "| warm | phantoms | Crop and re-encode, 25% | 1 |" in (tmp_path / "out/tables.md").read_text()


def test_evidence_of_a_cropped_picture_is_painted_where_it_is(checkpoint, questions, policy, tmp_path):
    """Gold boxes are in fractions of the stored image, of which the model sees the lower half; or nothing of them."""
    whole = load_image(questions.records[0].image_paths[0])
    whole.save(tmp_path / "whole.png")
    path = tmp_path / "whole.png#crop=0,0.5,1,1"
    boxes = {"in": Box(0.25, 0.5, 0.75, 0.75), "out": Box(0.25, 0.1, 0.75, 0.25)}
    records = [
        replace(questions.records[0], id=name, image_paths=(path,), boxes=(box,)) for name, box in boxes.items()
    ]
    conditions = ("localize", "dense", "evidence_hidden", "surroundings_hidden")
    run_bench({"warm": checkpoint}, [EvalSet("phantoms", tuple(records))], conditions, SETTINGS, tmp_path / "out")
    found = answers(tmp_path / "out")
    for name, inside in (("evidence_hidden", True), ("surroundings_hidden", False)):
        picture = painted(load_image(path), [Box(0.25, 0, 0.75, 0.5)], inside=inside)
        assert found[name]["in"]["text"] == ask(policy, records[0], picture)
        assert found[name]["out"]["text"] is None  # there is no evidence to paint over


def test_each_image_is_encoded_once(checkpoint, questions, tmp_path, monkeypatch):
    encoded, original = [], Branches.encode
    monkeypatch.setattr(Branches, "encode", lambda self, images: encoded.extend(images) or original(self, images))
    conditions = bench_conditions(("policy", "random", "divprune"), BUDGETS, ablations=False)
    run_bench({"warm": checkpoint}, [questions], conditions, replace(SETTINGS, batch_size=2), tmp_path)
    assert len(encoded) == 6


def is_right(text, record):
    """By the letter or the text of the right option."""
    return any(f"<answer>{said}</answer>" in text for said in (record.answer, record.options[record.answer]))


def test_figures_are_counted_from_the_answers(whole, questions):
    results = rescore(whole, bootstrap_samples=200)
    assert results["benchmarks"]["phantoms"]["left_out"] == 2
    found = answers(whole)

    def right(condition):
        rows = found[condition]
        return {r.id: is_right(rows[r.id]["text"], r) for r in questions.records if rows[r.id]["text"]}

    rows = {row["condition"]: row for row in results["rows"]}
    assert set(rows) == set(CONDITIONS) - {"localize"}
    for condition, row in rows.items():
        expected = right(condition)
        assert row["num_questions"] == len(expected)
        assert row["accuracy"] == pytest.approx(np.mean(list(expected.values())))
        if condition != "dense":
            dense = right("dense")
            gap = np.mean([expected[i] - dense[i] for i in expected])
            assert row["vs_dense"]["difference"] == pytest.approx(gap)
        if row["budget"] == "0.25":
            assert row["kept_ratio"] == 0.25
    assert rows["policy@0.25"]["vs_random"]["num_questions"] == 7
    assert rows["oracle@0.25"]["vs_random"]["num_questions"] == 6
    assert rows["random@0.25"]["vs_random"] is None
    templates = {(g["value"], g["condition"]): g for g in results["groups"] if g["by"] == "template"}
    assert templates["again", "dense"]["num_questions"] == 1
    assert {g["value"] for g in results["groups"] if g["by"] == "modality"} == {"", "MR"} | {
        r.meta.get("modality", "") for r in questions.records
    }


def test_one_changed_answer_changes_its_numbers_only(whole, questions, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "copy")
    before = rescore(tmp_path / "copy", bootstrap_samples=50)
    assert before == rescore(whole, bootstrap_samples=50)
    (file,) = (tmp_path / "copy" / "answers").rglob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (row,) = (r for r in rows if r["condition"] == "divprune@0.25" and r["id"] == "again")
    gold = questions.records[-1].answer
    wrong = not is_right(row["text"], questions.records[-1])
    row["text"] = f"<think>x</think><answer>{gold if wrong else 'Z'}</answer>"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    after = rescore(tmp_path / "copy", bootstrap_samples=50)
    changed = [a["condition"] for a, b in zip(after["rows"], before["rows"], strict=True) if a != b]
    assert changed == ["divprune@0.25"]
    touched = {(g["by"], g["value"], g["condition"]) for g in after["groups"]} - {
        (g["by"], g["value"], g["condition"]) for g in before["groups"] if g in after["groups"]
    }
    assert touched == {("template", "again", "divprune@0.25"), ("modality", "MR", "divprune@0.25")}
    sign = 1 if wrong else -1
    (a, b) = (next(r for r in x["rows"] if r["condition"] == "divprune@0.25") for x in (after, before))
    assert a["accuracy"] - b["accuracy"] == pytest.approx(sign / 7)


def test_rescoring_needs_no_model(whole, tmp_path):
    """Another process, given nothing but the folder, makes the same figures."""
    rescore(whole)
    before = (whole / "results.json").read_text()
    (whole / "results.json").unlink()
    command = [sys.executable, "-m", "vitos", "bench", "rescore", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert (whole / "results.json").read_text() == before


def test_the_report_s_files(whole):
    results = rescore(whole, bootstrap_samples=50)
    assert json.loads((whole / "results.json").read_text()) == results
    with (whole / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in results["rows"]]
    assert "vs_random.difference" in rows[0]
    assert "vs_random" not in rows[0]
    tables, page = (whole / "tables.md").read_text(), (whole / "report.html").read_text()
    for text in ("DivPrune, 25%", "Own boxes (ours), own budget", "Does it look?", "Minus random"):
        assert text in tables
        assert text in page
    assert "<script" not in page
    assert "data:image/svg+xml;base64," in page
    (times,) = results["seconds"]
    assert 0 < times["model_share"] <= 1
    assert {"vision", "open"} <= set(times["per_question"]["images"])


def test_two_models_and_their_base(checkpoint, questions, whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "two")
    small = bench_conditions(("random",), BUDGETS, ablations=False)
    run_bench({"nano": "nano"}, [questions], small, SETTINGS, tmp_path / "two")
    results = rescore(tmp_path / "two", base="nano", bootstrap_samples=50)
    assert {row["model"] for row in results["rows"]} == {"warm", "nano"}
    dense = {row["model"]: row for row in results["rows"] if row["condition"] == "dense"}
    if dense["nano"]["accuracy"]:
        assert dense["warm"]["relative"] == pytest.approx(dense["warm"]["accuracy"] / dense["nano"]["accuracy"])
    with pytest.raises(ValueError, match="no model 'other'"):
        rescore(tmp_path / "two", base="other")


def test_rows_that_cannot_be_used_are_named_and_counted(tmp_path, caplog):
    rows = []
    for number in range(23):
        folder = tmp_path / "imgs" / f"xmlab{number}"
        folder.mkdir(parents=True)
        if number == 0:
            Image.new("RGB", (60, 40)).save(folder / "source.jpg")
        else:
            (folder / "source.jpg").write_bytes(b"no picture")
        rows.append({
            "img_name": f"xmlab{number}/source.jpg", "question": "Is it healthy?", "answer": "Yes", "qid": number,
            "answer_type": "CLOSED", "q_lang": "en",
        })  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    (found,) = read_sets([], [f"slake={tmp_path}"])
    assert (len(found.records), len(found.left_out)) == (1, 22)
    told = caplog.messages
    assert len(told) == 21
    assert told[0].startswith("slake: left out test.json[1]: image source.jpg: ")
    assert told[-1] == "slake: 2 more rows are left out"


def test_sets_need_names_of_their_own(phantom_records, tmp_path):
    with pytest.raises(ValueError, match="nothing to ask"):
        read_sets([], [])


def test_two_processes_write_the_answers_of_one(checkpoint, tmp_path):
    from vitos.data.phantom import write_phantoms

    data = write_phantoms(tmp_path / "data", "test", 10)
    conditions = bench_conditions(("policy", "random", "fastv", "visionzip"), (0.5,))
    settings = {"batch_size": 3, "max_localization_tokens": 24, "max_reasoning_tokens": 14}
    worker = Path(__file__).with_name("worker.py")
    for name, processes in (("one", 1), ("two", 2)):
        asked = {"models": {"m": checkpoint}, "data": [str(data)], "conditions": conditions, "settings": settings}
        launch(worker, asked | {"out": str(tmp_path / name)}, tmp_path, processes)
    assert len(list((tmp_path / "two" / "answers").rglob("*.jsonl"))) == 2
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    one, two = (rescore(tmp_path / name, bootstrap_samples=50) for name in ("one", "two"))
    assert one["rows"] == two["rows"]
    assert one["groups"] == two["groups"]
