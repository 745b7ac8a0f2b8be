"""Two tiny random Qwen2.5-VL models of unlike shapes, and what plain `transformers` makes of a chat with images.

Their weights are large (N(0, 0.15)), so that a wrong position or a lost token changes logits visibly and greedy text
is no constant. float64 keeps "equal" and "nearly equal" apart. torch is imported on first use only: most tests need
no model.
"""

import copy

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# Time limits of single examples say something about a shared machine, not about the code.
settings.register_profile("vitos", deadline=None)
settings.load_profile("vitos")


def _redraw(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale, centre = (0.15, 0.0) if weight.ndim > 1 or "bias" in name else (0.3, 1.0)
            weight.copy_(torch.empty_like(weight).normal_(centre, scale, generator=generator))
    return model.double().eval()


@pytest.fixture(scope="session")
def nano():
    """The shape of `nano`: tied embeddings, full attention in every vision block, 8-pixel patches, merge 2."""
    from vitos.nano.build import build_nano

    backbone = build_nano()
    _redraw(backbone.model, 1)
    return backbone


@pytest.fixture(scope="session")
def windowed(nano):
    """Another shape: untied, more logits than tokens, windowed vision attention, 4-pixel patches, merge 3."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vitos.backbones.qwen2_5_vl import Qwen25VL

    config = copy.deepcopy(nano.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    text = {"vocab_size": 800, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    patches = {"patch_size": 4, "spatial_merge_size": 3, "window_size": 24, "fullatt_block_indexes": [1]}
    for name, value in (text | heads | {"rope_parameters": rope}).items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = config.text_config.layer_types[:3]
    for name, value in (vision | patches).items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(nano.model.generation_config)
    model.generation_config.eos_token_id = [2, 0]  # two stop tokens, as Qwen2.5-VL has
    size = {"shortest_edge": 24**2, "longest_edge": 96**2}
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=3, size=size)
    return Qwen25VL(_redraw(model, 2), nano.tokenizer, processor)


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

    The chat and its placeholders are written out as text, as the library's own processor does; positions are left
    to the model.
    """
    import torch

    def make(backbone, text, images, extra_ids=()):
        content = []
        for index, piece in enumerate(text.split("<image>")):
            content += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * bool(piece)
        chat = backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = {}
        if images:
            inputs = dict(backbone.image_processor(images=list(images), return_tensors="pt"))
            first, *rest = chat.split("<|image_pad|>")
            counts = [int(grid.prod()) // backbone.image_processor.merge_size**2 for grid in inputs["image_grid_thw"]]
            pads = ["<|image_pad|>" * n + piece for n, piece in zip(counts, rest, strict=True)]
            chat = "".join([first, *pads])
        ids = backbone.tokenizer(chat, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([ids, torch.tensor([list(extra_ids)], dtype=torch.long)], dim=1)
        types = (ids == backbone.model.config.image_token_id).int()
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}

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
def warm_policy(phantom_records):
    """A float32 policy that writes boxes and answers often, not always: trained for seconds on `phantom_records`.

    Do not train it: `clone_policy` makes a copy.
    """
    import itertools

    from vitos.data.images import load_image
    from vitos.nano.build import NANO_SPEC, build_nano
    from vitos.policy import SparseVLM
    from vitos.supervised import record_lesson, train_supervised

    backbone = build_nano()
    lessons = [record_lesson(r, load_image(r.image_paths[0]), backbone, NANO_SPEC) for r in phantom_records]
    train_supervised(backbone, itertools.cycle([lessons[:4], lessons[4:]]), steps=60, learning_rate=3e-3)
    return SparseVLM(backbone, NANO_SPEC)


@pytest.fixture(scope="session")
def clone_policy():
    """`clone_policy(policy)`: the same policy with weights of its own."""
    from vitos.policy import SparseVLM

    def clone(policy):
        backbone = copy.copy(policy.backbone)
        backbone.model = copy.deepcopy(policy.backbone.model)
        return SparseVLM(backbone, policy.spec)

    return clone
