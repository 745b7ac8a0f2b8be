"""Adapters on bfloat16 weights: the policy that was trained is the one that is saved, evaluated, gone on with and used
as the reference, on logits."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vitos.cli.run import _evaluation
from vitos.config.recipe import DataSection, LoraSection, ModelSection, Recipe
from vitos.core.prompt import pad_prompts
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

RUN = {"localization_steps": 2, "reasoning_steps": 2, "learning_rate": 1e-5, "localization_kl": 0.1, "save_steps": 1}


class Watch(TrainerCallback):
    """The network after the first stage, in float32; stops the run after an update."""

    def __init__(self, last=None):
        self.after_stage_one, self.last = None, last

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == RUN["localization_steps"]:
            self.after_stage_one = copy.deepcopy(model).eval().float()

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(make_trainer, warm_policy, phantom_records, tmp_path_factory):
    """A run on bfloat16 weights, and one that stopped in stage 2 and went on; `logits(network)` of a prompt."""
    from peft import LoraConfig

    base = tmp_path_factory.mktemp("lora")
    warm_policy.save_pretrained(base / "warm")

    def make(name, *callbacks):
        policy = SparseVLM.from_pretrained(base / "warm", dtype=torch.bfloat16, device="cpu")
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        return make_trainer(policy, base / name, callbacks, lora=lora, **RUN)

    def logits(network):
        query = Query(warm_policy.encode(phantom_records[0].image_paths[0]), phantom_records[0].question)
        prompt = warm_policy.branches.localize_prompt(query)
        with torch.no_grad():
            return network(**warm_policy.backbone.model_inputs(pad_prompts([prompt], 0))).logits

    watch = Watch()
    whole = make("whole", watch)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("parts", Watch(last=3)).train()
    parts = make("parts")
    parts.train(resume_from_checkpoint=True)
    plain = SparseVLM.from_pretrained(base / "warm", dtype=torch.bfloat16, device="cpu").backbone.model.float().eval()
    return base, whole, parts, watch, logits, logits(plain)


def close(found, trained, start):
    """Whether less than 1 % of what was learned is missing."""
    learned = float((trained - start).norm())
    assert learned > 1e-4
    return float((found - trained).norm()) < 0.01 * learned


def test_the_reference_of_stage_two_is_the_policy_that_stage_one_left(runs):
    base, whole, parts, watch, logits, start = runs
    trained = logits(watch.after_stage_one)
    assert close(logits(SparseVLM.from_pretrained(base / "whole/stage1", device="cpu").backbone.model), trained, start)
    for trainer in (whole, parts):
        reference = trainer.update.stage_one.backbone.model
        assert reference.dtype == torch.float32
        assert close(logits(reference), trained, start)


def test_the_evaluation_loads_the_policy_that_was_trained(runs):
    base, whole, _, _, logits, start = runs
    trained = logits(copy.deepcopy(whole.model).eval().float())
    model = ModelSection(path=str(base / "warm"), dtype="bfloat16", lora=LoraSection(r=8))
    recipe = Recipe(name="x", output_dir=str(base / "whole"), data=DataSection(train=("a.json",)), model=model)
    planned = _evaluation(recipe, str(base / "warm"))
    evaluated = SparseVLM.from_pretrained(planned.checkpoint, device="cpu", **planned.load)
    assert close(logits(evaluated.backbone.model.eval()), trained, start)
    rounded = SparseVLM.from_pretrained(planned.checkpoint, device="cpu", dtype=torch.bfloat16).backbone.model.float()
    assert not close(logits(rounded.eval()), trained, start)  # what would be lost otherwise


def test_a_resumed_run_has_the_weights_of_the_whole_one(runs):
    """Also the first weights of the adapters: they follow from the recipe's seed."""
    base, *_ = runs
    for folder in ("stage1", "model"):
        a, b = (load_file(base / name / folder / "model.safetensors") for name in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_activations_computed_again_are_the_same(make_trainer, warm_policy, recorder, dtype, tmp_path):
    """Of an update of both branches."""
    from peft import LoraConfig

    warm_policy.save_pretrained(tmp_path / "warm")
    found, passes = [], []
    for checkpointing in (False, True):
        policy, seen = SparseVLM.from_pretrained(tmp_path / "warm", dtype=dtype, device="cpu"), recorder()
        layer = policy.backbone.model.model.get_decoder().layers[0].self_attn
        layer.register_forward_hook(
            lambda *_, own=passes, way=checkpointing: own.append(way) if torch.is_grad_enabled() else None
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        options = {"schedule": "joint", "gradient_checkpointing": checkpointing, "lora": lora}
        make_trainer(policy, tmp_path / str(checkpointing), [seen], **options).train()
        found.append(seen.gradients)
    assert passes.count(True) > passes.count(False) > 0
    for kept, again in zip(*found, strict=True):
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert max(float(gradient.abs().max()) for gradient in found[0][0].values()) > 0


def test_adapters_are_saved_behind_activation_checkpointing_by_accelerate(make_trainer, tmp_path):
    """FSDP2's `activation_checkpointing` wraps each layer; PEFT alone finds no adapters in it and writes none."""
    from peft import LoraConfig
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    policy = SparseVLM.from_pretrained("nano", device="cpu")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    trainer = make_trainer(policy, tmp_path, lora=lora, **RUN)
    trainer.save_model(str(tmp_path / "plain"))
    layers = policy.backbone.model.model.get_decoder().layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    trainer.save_model(str(tmp_path / "wrapped"))
    plain, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys() != set()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)
    assert all("_checkpoint_wrapped_module" in name for name, _ in layers.named_parameters())  # and stays wrapped
