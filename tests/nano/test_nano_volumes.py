"""The shipped nano-volumes: small, an ordinary checkpoint, and it names the finding of a volume from all tokens."""

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vitos.data.phantom import render
from vitos.data.phantom_volumes import stack_samples
from vitos.nano import COMPLETE, VOLUMES_PATH
from vitos.policy.plans import Limits
from vitos.policy.vlm import SparseVLM


def test_both_complete_models_are_small():
    assert sum(file.stat().st_size for folder in COMPLETE.values() for file in folder.iterdir()) < 10_000_000


def test_it_is_an_ordinary_checkpoint_that_loads_as_float32():
    stored = load_file(VOLUMES_PATH / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = AutoModelForImageTextToText.from_pretrained(VOLUMES_PATH)
    assert model.dtype == torch.float32
    ours = SparseVLM.from_pretrained("nano-volumes", device="cpu").backbone.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


def test_it_names_the_finding_of_a_volume():
    policy, right = SparseVLM.from_pretrained("nano-volumes", device="cpu"), 0
    samples = list(stack_samples("train", 8, seed=5, templates=["kind_in_volume"]))
    for _, stack, question in samples:
        scan = policy.encode(*(render(scene) for scene in stack))
        found = policy.ask(scan, question.full_text(len(stack)), plan="dense", limits=Limits(max_tokens=48))
        right += found.answer == question.answer
    assert right >= 5  # chance is 2; 95 % of validation questions are right
