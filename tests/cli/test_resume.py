"""`--resume` with a changed recipe: trained on, applied, or refused by name; the record of a run stays true."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vitos.cli import run
from vitos.cli.resume import FREE, begin_run, check_resumed, is_trained
from vitos.config.recipe import load_recipe
from vitos.config.yaml_file import ConfigError
from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records

RECIPE = """
name: tiny
output_dir: {run}
data: {{train: {train}}}
train:
  localization_steps: 1
  reasoning_steps: 2
  questions_per_step: 2
  num_localizations: 2
  num_reasonings: 2
  learning_rate: 1.0e-4
  max_localization_tokens: 60
  max_reasoning_tokens: 12
  save_steps: 1
  save_total_limit: null
  log_samples_steps: 0
trainer: {{disable_tqdm: true}}
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """`begun(*changes)`: the tiny recipe with its run in a folder; the training file can be written again."""
    root = tmp_path_factory.mktemp("resume")
    train = write_phantoms(root, "train", 6)

    def make(folder, *changes):
        (root / "recipe.yaml").write_text(RECIPE.format(run=root / folder, train=train))
        return load_recipe(root / "recipe.yaml", list(changes))

    return make


@pytest.fixture(scope="module")
def finished(begun):
    return run.train(begun("finished"))


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_more_updates_of_the_last_stage_are_trained_and_equal_a_longer_run(begun, finished):
    before = weights(finished)
    longer = begun("finished", "train.reasoning_steps=4")
    assert is_trained(finished, begun("finished"))
    run.train(longer, resume=True)
    assert is_trained(finished, longer)
    whole = run.train(begun("whole", "train.reasoning_steps=4"))
    after, expected = weights(finished), weights(whole)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 5
    assert load_recipe(finished / "recipe.yaml").train.reasoning_steps == 4


@pytest.mark.parametrize(
    "change",
    [
        "train.learning_rate=1.0e-3",
        "train.localization_steps=2",
        "train.reasoning_steps=1",
        "train.schedule=joint",
        "train.temperature=0.5",
        "train.seed=3",
        "rewards.iou=0",
        "sparsify.margin=1",
        "model.dtype=bfloat16",
        "model.lora={r: 4}",
        "data.limit_train=4",
        "warm_start={steps: 1}",
        "trainer.adam_beta1=0.5",
    ],
)
def test_other_changes_are_refused_by_name_and_nothing_is_rewritten(begun, tmp_path, change):
    old = begun("x", f"output_dir={tmp_path}")
    records = read_records(old.data.train[0])
    begin_run(tmp_path, old, records)
    (tmp_path / "checkpoint-1").mkdir()
    said = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(ConfigError, match="cannot go on with a changed recipe") as caught:
        check_resumed(tmp_path, begun("x", f"output_dir={tmp_path}", change), records)
    key = change.partition("=")[0]
    assert any(line.startswith(key) for line in caught.value.problems), caught.value.problems
    assert (tmp_path / "recipe.yaml").read_bytes() == said
    check_resumed(tmp_path, old, records)


@pytest.mark.parametrize(
    "change", ["evaluate.bootstrap_samples=9", "train.save_steps=7", "name=other", "data.limit_eval=3"]
)
def test_what_does_not_touch_the_training_is_applied(begun, tmp_path, change):
    old = begun("x", f"output_dir={tmp_path}")
    records = read_records(old.data.train[0])
    begin_run(tmp_path, old, records)
    (tmp_path / "checkpoint-1").mkdir()
    new = begun("x", f"output_dir={tmp_path}", change)
    check_resumed(tmp_path, new, records)
    begin_run(tmp_path, new, records)
    assert load_recipe(tmp_path / "recipe.yaml") == new
    assert any(change.startswith(free) for free in FREE)


def test_changed_training_questions_are_refused(begun, tmp_path):
    recipe = begun("x", f"output_dir={tmp_path}")
    records = read_records(recipe.data.train[0])
    begin_run(tmp_path, recipe, records)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match=r"data\.train: the files hold other questions.*6 questions.*now 5"):
        check_resumed(tmp_path, recipe, records[:5])
    assert json.loads((tmp_path / "training_data.json").read_text())["questions"] == 6


def test_where_nothing_was_trained_everything_may_change(begun, tmp_path):
    old = begun("x", f"output_dir={tmp_path}")
    records = read_records(old.data.train[0])
    begin_run(tmp_path, old, records)
    check_resumed(tmp_path, begun("x", f"output_dir={tmp_path}", "train.learning_rate=1.0"), records[:5])
