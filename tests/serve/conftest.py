"""The embedded model and the demo's examples, made once per test file."""

import pytest

from vitos.policy.vlm import SparseVLM
from vitos.serve.demo.examples import draw_examples


@pytest.fixture(scope="module")
def vlm():
    return SparseVLM.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return draw_examples(tmp_path_factory.mktemp("examples"))
