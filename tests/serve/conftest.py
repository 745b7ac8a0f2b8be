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


@pytest.fixture(scope="session")
def headed(tmp_path_factory):
    """A checkpoint of nano with an evidence head that `vitos distill` trained for a few updates."""
    from typer.testing import CliRunner

    from vitos.cli.main import app
    from vitos.data.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("headed")
    data = write_phantoms(folder / "phantom", "train", 24)
    options = [
        "--teacher",
        "gold",
        "--validation",
        "0.3",
        "--steps",
        "10",
        "--batch-size",
        "8",
        "--out",
        str(folder / "out"),
    ]
    done = CliRunner().invoke(app, ["distill", "nano", "--data", str(data), *options])
    assert done.exit_code == 0, done.output
    return folder / "out"
