"""`benchmark:NAME[@SPLIT][=FOLDER]` wherever questions are read: check, convert, the evaluator, training's check."""

import json
from dataclasses import replace

import pytest
from tests.eval.datasets.releases import write_slake, write_vqa_rad

from vitos.cli import run
from vitos.cli.data import check_inputs
from vitos.config.recipe import load_recipe
from vitos.data.images import DataError, load_image
from vitos.data.readers import read_records
from vitos.eval.bench import read_sets
from vitos.eval.conditions import LOCALIZE, Settings
from vitos.eval.run import AskedModel, run_models
from vitos.eval.sources import check_sources, convert_benchmark, open_benchmark, read_set
from vitos.eval.store import EvalFolder


@pytest.fixture
def slake(tmp_path, monkeypatch):
    """A small release of SLAKE; images are stored in this test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "slake").mkdir()
    write_slake(tmp_path / "slake")
    return tmp_path / "slake"


def test_a_benchmark_is_one_set_with_the_rows_that_are_left_out(slake):
    one = read_set(f"benchmark:slake={slake}")
    assert one.name == f"benchmark:slake={slake}"
    assert (len(one.records), len(one.left_out)) == (6, 7)
    assert len(read_set(f"benchmark:slake={slake}", limit=2).records) == 2
    assert [one.records for one in read_sets([], [f"slake@test={slake}"])] == [one.records]


def test_the_split_can_be_chosen(slake, tmp_path):
    (slake / "test.json").rename(slake / "train.json")
    assert open_benchmark(f"benchmark:slake@train={slake}").split == "train"
    with pytest.raises(DataError, match="test"):
        open_benchmark(f"benchmark:slake={slake}")
    with pytest.raises(ValueError, match="no split 'dev'; it has test, validation, train"):
        open_benchmark(f"benchmark:slake@dev={slake}")
    with pytest.raises(ValueError, match="no benchmark 'slak'"):
        open_benchmark("benchmark:slak")


def test_what_is_converted_is_what_is_read_with_its_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rad").mkdir()
    write_vqa_rad(tmp_path / "rad")
    source = f"benchmark:vqa_rad={tmp_path / 'rad'}"
    released = read_set(source).records
    written = convert_benchmark(source, tmp_path / "json")
    read = read_records(tmp_path / "json" / "test.json")
    assert written == len(read) == len(released) > 0
    assert {record.kind for record in read} == {"letter", "text"}
    for one, other in zip(released, read, strict=True):
        assert replace(one, image_paths=()) == replace(other, image_paths=())
        for path, copy in zip(one.image_paths, other.image_paths, strict=True):
            assert load_image(path).tobytes() == load_image(copy).tobytes()


def test_an_image_that_is_trained_on_and_in_the_benchmark_is_told(slake, tmp_path):
    source = f"benchmark:slake={slake}"
    convert_benchmark(source, tmp_path / "json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: x\noutput_dir: x\ndata: {{train: {tmp_path}/json/test.json, eval: ['{source}']}}\n")
    train, evaluated = check_sources(*check_inputs([str(recipe)]))
    assert not train.problems
    assert evaluated.source == source
    assert any("xmlab1" in str(p) or "slake/" in str(p) for p in evaluated.of("warning"))
    assert run.recipe_images(load_recipe(recipe))


def test_a_benchmark_with_open_questions_is_trained_on_as_it_was_released(slake, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sizes = "questions_per_step: 3, num_localizations: 2, num_reasonings: 2, localization_steps: 1, reasoning_steps: 1"
    lengths = "max_localization_tokens: 8, max_reasoning_tokens: 8, log_samples_steps: 1, log_samples: 3"
    recipe.write_text(
        f"name: x\noutput_dir: {tmp_path}/x\ndata: {{train: 'benchmark:slake={slake}'}}\n"
        f"warm_start: {{steps: 1, batch_size: 3}}\ntrain: {{{sizes}, {lengths}}}\n"
    )
    run.train(load_recipe(recipe))
    assert (tmp_path / "x/model/vitos.json").is_file()
    golds = {
        row["gold"] for step in (1, 2) for row in json.loads((tmp_path / f"x/samples/step-{step}.json").read_text())
    }
    assert golds - {"A", "B"}  # texts and words, not letters alone


def test_the_reasons_of_unusable_rows_are_kept(slake, tmp_path, warm_policy):
    one = read_set(f"benchmark:slake={slake}")
    model = AskedModel(name="m", path="", conditions=(LOCALIZE,), load=lambda: warm_policy)
    settings = Settings(max_localization_tokens=2, max_reasoning_tokens=2)
    run_models([model], [one], settings, tmp_path / "run")
    left_out = EvalFolder(tmp_path / "run").left_out("m")
    assert [(row["id"], row["reason"]) for row in left_out] == list(one.left_out)
    assert len(left_out) == 7
