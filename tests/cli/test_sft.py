"""`vitos sft`, and `vitos train --resume` that goes on from it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vitos.cli import run
from vitos.cli.main import main
from vitos.config.recipe import ConfigError, load_recipe
from vitos.data.phantom import write_phantoms
from vitos.policy.vlm import SparseVLM
from vitos.rl import sft as module

RECIPE = """
name: tiny
output_dir: {run}
data: {{train: {train}}}
warm_start: {{steps: 4, batch_size: 4, learning_rate: 1.0e-3, save_steps: 1, by_image: true}}
train:
  localization_steps: 1
  reasoning_steps: 1
  questions_per_step: 2
  num_localizations: 2
  num_reasonings: 2
  max_localization_tokens: 40
  max_reasoning_tokens: 14
  skip_equal_outcomes: false
  learning_rate: 1.0e-3
  log_samples_steps: 0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """`recipe(name, *changes)`: a recipe whose run folder has this name."""
    base = tmp_path_factory.mktemp("sft")
    train = write_phantoms(base / "data", "train", 6)

    def make(name, *changes):
        file = base / f"{name}.yaml"
        file.write_text(RECIPE.format(run=base / name, train=train))
        return load_recipe(file, changes)

    make.folder = base
    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def vitos(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["vitos", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_training_goes_on_from_the_start_as_if_it_had_made_it(recipe, monkeypatch, capsys):
    whole = run.train(recipe("whole"))
    recipe("parts")
    file = recipe.folder / "parts.yaml"
    code, out, error = vitos(monkeypatch, capsys, "sft", file)
    assert code == 0, error
    assert "loss, first update" in out
    parts = recipe.folder / "parts"
    assert not (parts / "model").exists()
    assert [json.loads(line)["step"] for line in (parts / "sft" / "sft.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    assert not list((parts / "sft").glob("checkpoint-*"))
    assert same(weights(parts / "warm_start"), weights(whole / "warm_start"))
    code, _, error = vitos(monkeypatch, capsys, "sft", file)
    assert code == 1
    assert "pass --resume to go on" in error
    code, _, error = vitos(monkeypatch, capsys, "train", file, "--resume")
    assert code == 0, error
    assert same(weights(parts / "model"), weights(whole / "model"))
    assert not same(weights(parts / "model"), weights(parts / "warm_start"))


def test_an_interrupted_start_goes_on(recipe, monkeypatch, capsys):
    whole = run.start(recipe("at-once"))

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    recipe("again")
    file, real = recipe.folder / "again.yaml", module.SupervisedTrainer.__init__
    monkeypatch.setattr(
        module.SupervisedTrainer, "__init__", lambda self, *a, **k: real(self, *a, **k, callbacks=[Stop()])
    )
    code, out, _ = vitos(monkeypatch, capsys, "sft", file)
    assert code == 130
    assert "checkpoint-2" in out or "checkpoint-3" in out
    monkeypatch.setattr(module.SupervisedTrainer, "__init__", real)
    code, _, error = vitos(monkeypatch, capsys, "sft", file)
    assert code == 1
    assert "pass --resume" in error
    with pytest.raises(ConfigError, match=r"warm_start\.learning_rate"):
        run.start(recipe("again", "warm_start.learning_rate=1.0e-4"), resume=True)
    code, _, error = vitos(monkeypatch, capsys, "sft", file, "--resume")
    assert code == 0, error
    assert same(weights(recipe.folder / "again" / "warm_start"), weights(whole / "warm_start"))


def test_adapters_are_trained_on(recipe):
    changes = ("model.lora={r: 4, alpha: 8}", "model.dtype=bfloat16")
    folder = run.train(recipe("lora", *changes))
    started, trained = weights(folder / "warm_start"), weights(folder / "model")
    assert {t.dtype for t in started.values()} == {torch.float32}
    changed = {name for name in trained if not torch.equal(trained[name], started[name])}
    assert changed
    assert all("visual" not in name for name in changed)
    # The same adapters before and after: the change of both stages has the rank of one adapter.
    nano = SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.bfloat16).backbone.model.state_dict()
    name = next(n for n in sorted(changed) if n.endswith("q_proj.weight"))
    before = next(value for key, value in nano.items() if key.endswith(name.removeprefix("model.")))
    values = torch.linalg.svdvals(trained[name] - before.float())
    assert float(values[3]) > 0
    assert float(values[4]) < 1e-4 * float(values[0])


def test_a_recipe_without_a_start_is_refused_and_a_dry_run_prints(recipe, monkeypatch, capsys):
    recipe("none")
    file = recipe.folder / "none.yaml"
    code, _, error = vitos(monkeypatch, capsys, "sft", file, "--set", "warm_start=null")
    assert code == 1
    assert "warm_start: is null; set at least warm_start.steps" in error
    code, out, _ = vitos(monkeypatch, capsys, "sft", file, "--dry-run")
    assert code == 0
    assert "by_image: true" in out
    assert not (recipe.folder / "none").exists()
    with pytest.raises(ConfigError, match=r"warm_start\.train_encoder: does not go with model\.lora"):
        recipe("none", "model.lora={r: 4}", "warm_start.train_encoder=true")
