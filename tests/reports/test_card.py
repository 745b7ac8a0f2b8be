"""The model card, read by the hub's own parser."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from vitos.reports.card import model_card
from vitos.reports.page import RESEARCH_ONLY

RECIPE = {
    "name": "quickstart",
    "output_dir": "/home/someone/runs/quickstart",
    "data": {"train": ("/data/secret/train.json", "runs/phantom/train.json"), "eval": None},
    "train": {"learning_rate": 2e-6, "schedule": "staged"},
}


def test_front_matter_is_what_the_hub_reads(results):
    data = ModelCard(model_card(results, RECIPE, "lingshu-medical-mllm/Lingshu-7B")).data
    assert data.base_model == "lingshu-medical-mllm/Lingshu-7B"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.library_name == "transformers"
    assert data.license == "other"
    assert {"vitos", "medical", "research-only"} <= set(data.tags)


@pytest.mark.parametrize("base", ["/models/private/base", "nano", "C:\\models\\base"])
def test_a_folder_is_no_base_model_of_the_hub(results, base):
    text = model_card(results, RECIPE, base)
    assert ModelCard(text).data.base_model is None
    assert "private" not in text
    assert "models" not in text


def test_card_says_what_it_is_for_and_how_it_did(results):
    text = model_card(results, RECIPE, "owner/base", license="apache-2.0")
    assert RESEARCH_ONLY in text
    assert "license: apache-2.0" in text
    assert "| Sparse branch, kept tokens | 68.3% |" in text
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Intended use",
        "How to use",
        "Results",
        "Training",
        "Limits",
    ]


def test_recipe_is_whole_but_for_the_machines_folders(results):
    text = model_card({**results, "dataset": "/data/secret/test.json, runs/b.json"}, RECIPE, "owner/base")
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(block[1]) == {
        "name": "quickstart",
        "output_dir": "quickstart",
        "data": {"train": ["train.json", "runs/phantom/train.json"], "eval": None},
        "train": {"learning_rate": 2e-6, "schedule": "staged"},
    }
    assert "secret" not in text
    assert "someone" not in text
    assert "questions of test.json, runs/b.json" in text


def test_names_cannot_bring_html_and_nulls_are_dashes(results):
    text = model_card({**dict.fromkeys(results), "name": "<script>x</script>"}, {}, "owner/base")
    assert "<script" not in text
    assert "None" not in text
    assert "| Base model, all tokens | – |" in text


def test_addresses_and_folders_of_benchmarks_are_left_out():
    recipe = {
        "judge": {"url": "http://10.0.0.5:8001/v1"},
        "data": {"train": ["benchmark:slake@train=/data/someone/slake"]},
    }
    text = model_card({"dataset": "benchmark:vqa_rad=/data/someone/rad"}, recipe, "nano")
    assert "10.0.0.5" not in text
    assert "someone" not in text
    assert "benchmark:slake@train=slake" in text
