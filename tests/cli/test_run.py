"""The verbs of the command line, end to end on the embedded model: what a user types, and what a user gets wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.driven import up_to
from transformers import AutoModelForImageTextToText

from vitos.cli.main import main
from vitos.core.registry import PLANS
from vitos.data.phantom import write_phantoms
from vitos.nano import NANO_PATH
from vitos.policy.branches import Branches
from vitos.policy.vlm import SparseVLM

RECIPE = """
name: tiny
output_dir: {run}
data: {{train: {train}, eval: {test}}}
train:
  localization_steps: 2
  reasoning_steps: 2
  questions_per_step: 4
  num_localizations: 2
  num_reasonings: 2
  learning_rate: 1.0e-4
  max_localization_tokens: 80
  max_reasoning_tokens: 20
  save_steps: 2
  log_samples_steps: 2
  log_samples: 1
evaluate: {{budgets: [0.25], batch_size: 8, bootstrap_samples: 200}}
"""
QUESTION = "What is the finding in the left lung?\\nA. nodule\\nB. cyst\\nC. mass\\nD. calcification"


def vitos(capsys, monkeypatch, *args):
    """Exit code, standard output and standard error of one call."""
    monkeypatch.setattr("sys.argv", ["vitos", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Phantoms and a recipe for them."""
    root = tmp_path_factory.mktemp("run")
    train, test = write_phantoms(root, "train", 8), write_phantoms(root, "test", 10)
    (root / "recipe.yaml").write_text(RECIPE.format(run=root / "out", train=train, test=test))
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a finished run."""
    from vitos.cli import run
    from vitos.config.recipe import load_recipe

    return run.train(load_recipe(folder / "recipe.yaml", ["trainer.disable_tqdm=true"]))


def test_a_run_leaves_a_model_a_report_and_results(trained):
    AutoModelForImageTextToText.from_pretrained(trained / "model")  # plain transformers reads it
    assert json.loads((trained / "model" / "vitos.json").read_text())["fusion"]["mode"] == "weighted"
    results = json.loads((trained / "results.json").read_text())
    cases = [json.loads(line) for line in (trained / "cases.jsonl").read_text().splitlines()]
    assert results["num_questions"] == len(cases) == 10
    right = [case["conditions"]["sparse"]["correct"] for case in cases]
    assert results["sparse_accuracy"] == pytest.approx(sum(right) / 10)
    kept = [case["conditions"]["sparse"]["kept_ratio"] for case in cases]
    assert results["kept_ratio"] == pytest.approx(sum(kept) / 10)
    for case in cases:  # controls see as many tokens as the policy kept
        tokens = case["conditions"]
        assert len(tokens["random"]["kept"]) == len(tokens["centre"]["kept"]) == len(tokens["sparse"]["kept"])
        assert (trained / case["image"]).is_file()
    assert results["control_rl_dense_accuracy"] is None
    assert set(results["budgets"]) == {"0.25"}
    assert "<html" in (trained / "report.html").read_text()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in metrics] == [1, 1, 2, 2]
    assert (trained / "samples" / "step-2-0.png").is_file()


def test_a_finished_run_is_refused_or_resumed(trained, folder, capsys, monkeypatch):
    before = (trained / "model" / "model.safetensors").read_bytes()
    code, _, error = vitos(capsys, monkeypatch, "train", folder / "recipe.yaml")
    assert code == 1
    assert "--resume" in error
    code, out, _ = vitos(capsys, monkeypatch, "train", folder / "recipe.yaml", "--resume")
    assert code == 0, out
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_two_processes_share_one_run(folder, tmp_path):
    """Each would train alone, and write its own lines, if they did not know of one another."""
    sets = (f"output_dir={tmp_path / 'run'}", "data.eval=[]")
    command = [sys.executable, "-m", "vitos", "train", str(folder / "recipe.yaml"), "--processes", "2"]
    command += [part for value in sets for part in ("--set", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (sample, *_) = json.loads((tmp_path / "run" / "samples" / "step-2.json").read_text())
    assert len(sample["localizations"]) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_eval_relates_a_checkpoint_to_its_base(trained, folder, capsys, monkeypatch, tmp_path):
    args = ["--data", folder / "test.json", "--base", "nano", "--budget", "0.5", "--max-tokens", "40"]
    code, out, error = vitos(capsys, monkeypatch, "eval", trained / "model", *args, "--limit", 6, "--out", tmp_path)
    assert code == 0, error
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_questions"] == 6
    assert results["base_dense_accuracy"] is not None
    assert "Report" in out


def test_ask_answers_and_draws(folder, capsys, monkeypatch, tmp_path):
    image = next((folder / "images").iterdir())
    code, out, error = vitos(capsys, monkeypatch, "ask", "nano", image, QUESTION, "--overlay", tmp_path / "o.png")
    assert code == 0, error
    vlm = SparseVLM.from_pretrained("nano")
    finding = vlm.ask(vlm.encode(image), QUESTION.replace("\\n", "\n"))
    assert re.search(rf"answer +{finding.answer or 'no answer'}", out)
    assert re.search(rf"tokens kept +{finding.kept.count} of 64", out)
    assert "reason_decode" in out
    assert Image.open(tmp_path / "o.png").width >= 384


HEADED = ("glance", "one_pass")


@pytest.mark.parametrize("plan", HEADED)
def test_ask_by_a_plan_without_its_head_says_how_to_train_one(folder, capsys, monkeypatch, plan):
    image = next((folder / "images").iterdir())
    code, _, error = vitos(capsys, monkeypatch, "ask", "nano", image, QUESTION, "--plan", plan)
    assert code == 1
    assert f"vitos distill --plan {plan}" in error


@pytest.mark.parametrize("plan", [name for name in PLANS.names() if name not in HEADED])
def test_ask_by_a_plan(folder, capsys, monkeypatch, tmp_path, plan):
    image = f"{next((folder / 'images').iterdir())}#crop=0,0,1,0.75"
    options = ("--plan", plan, "--max-tokens", 60, "--overlay", tmp_path / "o.png")
    code, out, error = vitos(capsys, monkeypatch, "ask", "nano", image, QUESTION, *options)
    assert code == 0, error
    vlm = SparseVLM.from_pretrained("nano")
    finding = vlm.ask(vlm.encode(image, plan=plan), QUESTION.replace("\\n", "\n"), plan=plan, limits=up_to(60))
    assert re.search(rf"plan +{plan}", out)
    assert re.search(rf"answer +{finding.answer or 'no answer'}", out)
    assert re.search(rf"tokens kept +{finding.kept.count} of 48", out)
    assert ("localize_decode" in out) == (plan != "dense")
    overlay = Image.open(tmp_path / "o.png")
    assert overlay.width == overlay.height  # of the whole image


@pytest.mark.parametrize("plan", ["gather", "coarse"])
def test_eval_by_a_plan(folder, capsys, monkeypatch, tmp_path, plan):
    args = ["--data", folder / "test.json", "--limit", 3, "--max-tokens", 60, "--out", tmp_path]
    code, _, error = vitos(capsys, monkeypatch, "eval", "nano", *args, "--plan", plan)
    assert code == 0, error
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["plan"] == plan
    assert (results["control_random_accuracy"] is None) == (plan == "coarse")
    vlm = SparseVLM.from_pretrained("nano")
    for case in map(json.loads, (tmp_path / "cases.jsonl").read_text().splitlines()):
        finding = vlm.ask(
            vlm.encode(tmp_path / case["image"], plan=plan), case["question"], plan=plan, limits=up_to(60)
        )
        assert case["conditions"]["sparse"]["text"] == finding.reasoning.completion.text
        assert case["conditions"]["sparse"]["kept"] == finding.kept.mask.nonzero()[0].tolist()


def test_eval_refuses_the_plan_that_it_compares_with(folder, capsys, monkeypatch, tmp_path):
    args = ["--data", folder / "test.json", "--out", tmp_path]
    code, _, error = vitos(capsys, monkeypatch, "eval", "nano", *args, "--plan", "dense")
    assert code == 1
    assert "choose one of coarse, crop, gather, glance, one_pass, two_pass" in error


def test_data_verbs(folder, capsys, monkeypatch, tmp_path):
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", folder / "test.json")
    assert code == 0
    assert "10" in out
    code, _, _ = vitos(capsys, monkeypatch, "data", "convert", folder / "test.json", tmp_path / "p", "--to", "parquet")
    assert code == 0
    assert list((tmp_path / "p").rglob("*.parquet"))


def test_training_and_evaluation_from_a_cache_are_the_same_to_the_last_bit(folder, tmp_path, capsys, monkeypatch):
    """Two updates, then all conditions of the evaluation with its base model."""
    found = {}
    cache = tmp_path / "cache"
    recipe = [folder / "recipe.yaml", "--set", "train.localization_steps=1", "--set", "train.reasoning_steps=1"]
    for name in ("without", "with"):
        args = [*recipe, "--set", f"output_dir={tmp_path / name}", "--set", "trainer.disable_tqdm=true"]
        if name == "with":
            args += ["--set", f"data.cache={cache}"]
            code, out, error = vitos(capsys, monkeypatch, "data", "cache", *args)
            assert code == 0, error
            assert "18 distinct" in out
            monkeypatch.setattr(Branches, "encode", None)  # nothing is encoded from here on
        code, _, error = vitos(capsys, monkeypatch, "train", *args)
        assert code == 0, error
        run = tmp_path / name
        results = json.loads((run / "results.json").read_text())
        for key in ("seconds_by_stage", "command", "checkpoint", "answers"):
            del results[key]
        metrics = [
            {
                k: v
                for k, v in json.loads(line).items()
                if not k.startswith("memory/") and "seconds" not in k and "runtime" not in k and "_per_" not in k
            }
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        weights = (run / "model" / "model.safetensors").read_bytes()
        found[name] = (results, metrics, (run / "cases.jsonl").read_text(), weights)
    for without, cached in zip(found["without"], found["with"], strict=True):
        assert without == cached


def test_a_cache_that_does_not_fit_is_refused(folder, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    code, _, error = vitos(
        capsys, monkeypatch, "data", "cache", "nano", "--data", folder / "train.json", "--out", cache
    )
    assert code == 0, error
    eager = [
        "--set",
        f"data.cache={cache}",
        "--set",
        "model.attn_implementation=eager",
        "--set",
        f"output_dir={tmp_path / 'o'}",
    ]
    code, _, error = vitos(capsys, monkeypatch, "train", folder / "recipe.yaml", *eager)
    assert code == 1
    assert "attention: sdpa in the cache, eager here" in error
    assert not (tmp_path / "o").exists()
    args = ["--data", folder / "test.json", "--cache", cache, "--out", tmp_path / "e", "--limit", 2]
    code, _, error = vitos(capsys, monkeypatch, "eval", "nano", *args)
    assert code == 1
    assert re.search(r"test_\w+\.png is not in the cache", error.replace("\n", ""))


@pytest.mark.parametrize(("source", "shown"), [("CT_small.dcm", "DICOM MONOCHROME2, 128 x 128, window 135.5,2063")])
def test_dicom_from_check_to_overlay(folder, tmp_path, capsys, monkeypatch, source, shown):
    data = pytest.importorskip("pydicom.data", reason="the dicom extra is not installed")
    file = data.get_testdata_file(source, download=False)
    code, out, error = vitos(capsys, monkeypatch, "ask", "nano", file, QUESTION, "--overlay", tmp_path / "o.png")
    assert code == 0, error
    assert shown in out
    assert Image.open(tmp_path / "o.png").width >= 384
    code, out, _ = vitos(capsys, monkeypatch, "ask", "nano", f"{file}#window=40,400", QUESTION)
    assert "window 40,400 (selector)" in out
    code, _, error = vitos(capsys, monkeypatch, "ask", "nano", f"{file}#frame=2", QUESTION)
    assert code == 1
    assert "frame=2 is not there" in error

    shutil.copy(file, tmp_path / "ct.dcm")
    record = {"question": QUESTION.replace("\\n", "\n"), "answer": "A", "bbox": [[0.1, 0.1, 0.5, 0.5]]}
    rows = [record | {"image_path": f"ct.dcm#window=40,{width}"} for width in (100, 400)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", tmp_path / "test.json")
    assert code == 0
    assert "No problems found" in out
    args = ["--data", tmp_path / "test.json", "--out", tmp_path / "e", "--max-tokens", 24]
    code, _, error = vitos(capsys, monkeypatch, "eval", "nano", *args)
    assert code == 0, error
    cases = [json.loads(line) for line in (tmp_path / "e" / "cases.jsonl").read_text().splitlines()]
    assert [case["images"][0]["rendering"]["window"] for case in cases] == [[40, 100], [40, 400]]
    (tmp_path / "test.json").write_text(json.dumps([record | {"image_path": "ct.dcm#window=40"}]))
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", tmp_path / "test.json")
    assert code == 1


# --- what a user gets wrong -----------------------------------------------------------------------------------------


def damaged(folder, tmp_path, change):
    """A copy of the data set, its first record or image changed, and a recipe that trains on it."""
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("out"))
    rows = json.loads((root / "train.json").read_text())
    change(rows[0], root / rows[0]["image_path"][0])
    (root / "train.json").write_text(json.dumps(rows))
    text = RECIPE.format(run=root / "out", train=root / "train.json", test=root / "test.json")
    (root / "recipe.yaml").write_text(text)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, image: image.unlink(), "train_0_0.png"),
        (lambda row, image: image.write_bytes(image.read_bytes()[:400]), "train_0_0.png"),
        (lambda row, image: Image.new("RGB", (1, 1)).save(image), "train_0_0.png"),
        (lambda row, image: row.update(bbox=[[0.1, 0.1, 1.5, 0.2]]), "train.json[0]"),
        (lambda row, image: row.update(answer="Z"), "train.json[0]"),
        (lambda row, image: row.update(image_path=["../../etc/passwd"]), "train.json[0]"),
    ],
    ids=["missing image", "truncated image", "1x1 image", "box out of range", "answer no option", "path outside"],
)
def test_bad_data_is_refused_before_anything_is_written(folder, tmp_path, capsys, monkeypatch, change, message):
    root = damaged(folder, tmp_path, change)
    code, _, error = vitos(capsys, monkeypatch, "train", root / "recipe.yaml")
    assert code == 1
    assert message in error
    assert not (root / "out").exists()
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", root / "train.json")
    assert code == 1, out


def test_an_unknown_key_names_the_nearest(folder, capsys, monkeypatch):
    code, _, error = vitos(capsys, monkeypatch, "train", folder / "recipe.yaml", "--set", "train.lerning_rate=1")
    assert code == 1
    assert "train.learning_rate" in error


def test_a_checkpoint_of_another_geometry_is_refused(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(NANO_PATH, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    config["size"]["longest_edge"] *= 4
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(config))
    image = next((folder / "images").iterdir())
    code, _, error = vitos(capsys, monkeypatch, "ask", tmp_path / "model", image, QUESTION)
    assert code == 1
    assert "boxes would shift" in error


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    from vitos.rl.trainer import DualStreamTrainer

    step = DualStreamTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    out = tmp_path / "out"
    call = ["train", folder / "recipe.yaml", "--set", f"output_dir={out}"]
    monkeypatch.setattr(DualStreamTrainer, "training_step", interrupted)
    code, text, _ = vitos(capsys, monkeypatch, *call)
    assert code == 130
    assert "checkpoint-2" in text
    assert "--resume" in text
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(Path(out).glob(".*"))
    monkeypatch.setattr(DualStreamTrainer, "training_step", step)
    code, _, error = vitos(capsys, monkeypatch, *call, "--resume")
    assert code == 0, error
    assert (out / "results.json").is_file()
