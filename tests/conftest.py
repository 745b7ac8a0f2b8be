"""Two tiny random Qwen2.5-VL models of unlike shapes, and what plain `transformers` makes of a chat with images.

They are rows of `tests/backbones/families.py`. torch is imported on first use only: most tests need no model.
"""

import copy
import gc
import os
import sys

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# Time limits of single examples say something about a shared machine, not about the code.
settings.register_profile("vitos", deadline=None)
settings.load_profile("vitos")


def pytest_collection_finish():
    """Leave what is imported by now out of all further collections of garbage: accelerate asks for one per training.

    Each took 0.8 seconds, a fifth of the time of the trainer's tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _shared_models_stay_as_they_are():
    """A test that changes a shared model would break others, in some orders only."""
    yield
    family = sys.modules.get("tests.backbones.family")
    assert not family or not (found := family.changes()), found


@pytest.fixture(scope="session")
def nano():
    from tests.backbones import families

    return families.FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()


@pytest.fixture(scope="session")
def windowed():
    from tests.backbones import families

    return families.FAMILIES_BY_NAME["qwen2_5_vl, merge 3"].backbone()


@pytest.fixture(scope="session")
def picture():
    """`picture(width, height, seed)`: an RGB image of noise and a gradient."""

    def make(width, height, seed=0):
        rng = np.random.default_rng([width, height, seed])
        ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 80, height)[:, None, None]
        return Image.fromarray((ramp + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def hf_inputs():
    """`hf_inputs(backbone, text, images, extra_ids)`: keyword arguments for the unmodified model, batch of one.

    The library's own processor makes them from text and pixels; positions are left to the model.
    """
    from tests.backbones.family import library_inputs
    from tests.backbones.family_qwen import qwen2_5_vl_processor

    def make(backbone, text, images, extra_ids=()):
        return library_inputs(qwen2_5_vl_processor(backbone), text, images, extra_ids)

    return make


@pytest.fixture(scope="session")
def hf_positions():
    """`hf_positions(backbone, inputs)`: the library's own positions of `hf_inputs`, shape (3, T)."""

    def make(backbone, inputs):
        positions, _ = backbone.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        return positions[:, 0]

    return make


@pytest.fixture(scope="session")
def phantom_records(tmp_path_factory):
    """Eight phantom questions with gold boxes."""
    from vitos.data.phantom import write_phantoms
    from vitos.data.readers import read_records

    return read_records(write_phantoms(tmp_path_factory.mktemp("phantoms"), "train", 8))


@pytest.fixture(scope="session")
def warm_policy(phantom_records, tmp_path_factory):
    """A float32 policy that writes boxes and answers often, not always: trained for seconds on `phantom_records`.

    Processes of one run share it. Do not train it: `clone_policy` makes a copy.
    """
    import itertools

    import torch
    from filelock import FileLock
    from scripts.nano_model import NANO_SPEC, build_nano
    from scripts.plain_loop import train_supervised

    from vitos.data.images import load_image
    from vitos.policy.vlm import SparseVLM
    from vitos.rl.lessons import record_lesson

    backbone = build_nano()
    base = tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm_policy.pt"
    with FileLock(f"{kept}.lock"):
        if kept.is_file():
            backbone.model.load_state_dict(torch.load(kept, weights_only=True))
            return SparseVLM(backbone, NANO_SPEC)
        lessons = [record_lesson(r, [load_image(r.image_paths[0])], backbone, NANO_SPEC) for r in phantom_records]
        train_supervised(backbone, itertools.cycle([lessons[:4], lessons[4:]]), steps=60, learning_rate=3e-3)
        torch.save(backbone.model.state_dict(), kept)
    return SparseVLM(backbone, NANO_SPEC)


@pytest.fixture(scope="session")
def clone_policy():
    """`clone_policy(policy)`: the same policy with a copy of the weights."""
    from vitos.policy.vlm import SparseVLM

    def clone(policy):
        backbone = copy.copy(policy.backbone)
        backbone.model = copy.deepcopy(policy.backbone.model)
        return SparseVLM(backbone, policy.spec)

    return clone
