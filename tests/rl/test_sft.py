"""The supervised trainer against the plain loop, resume, packing by image, adapters, and what it refuses."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts.nano_model import NANO_SPEC, build_nano
from scripts.plain_loop import train_supervised
from transformers import AutoModelForImageTextToText, TrainerCallback

from vitos.core.prompt import pad_prompts
from vitos.core.record import Record
from vitos.data.images import load_image
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.callbacks import read_metrics
from vitos.rl.lessons import Exercise, Lesson, record_lesson
from vitos.rl.sft import SFT_METRICS, Ordered, SupervisedConfig, SupervisedTrainer

QUESTION = "<image>What is it?\nA. cyst\nB. mass"


def fresh(backbone):
    other = copy.copy(backbone)
    other.model = copy.deepcopy(backbone.model).float()
    return other


def trainer(policy, folder, records, steps=3, callbacks=(), lora=None, cache=None, **options):
    defaults = {"batch_size": 4, "learning_rate": 1e-3, "save_steps": 1000, "logging_steps": 1, "seed": 5}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "weight_decay": 0.01}
    config = SupervisedConfig(output_dir=str(folder), max_steps=steps, **defaults | options)
    return SupervisedTrainer(policy, config, records, lora=lora, cache=cache, callbacks=callbacks)


def weights(policy):
    return {name: p.detach() for name, p in policy.backbone.model.named_parameters()}


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_encoder", [True, False])
def test_the_trainer_is_the_plain_loop(train_encoder, nano, phantom_records, tmp_path):
    """The same updates by twenty lines of PyTorch: AdamW, one cycle, clipped gradients, shuffled passes."""
    policy, plain = SparseVLM(fresh(nano), NANO_SPEC), SparseVLM(fresh(nano), NANO_SPEC)
    start = copy.deepcopy(weights(policy))
    trainer(policy, tmp_path, phantom_records, train_encoder=train_encoder, answer_weight=3.0).train()
    rng = np.random.default_rng(5)
    order = [int(i) for _ in range(2) for i in rng.permutation(len(phantom_records))]
    lessons = {
        r.id: record_lesson(r, [load_image(r.image_paths[0])], plain.backbone, NANO_SPEC) for r in phantom_records
    }
    batches = [[lessons[phantom_records[i].id] for i in order[4 * n : 4 * n + 4]] for n in range(3)]
    for module in plain.backbone.vision_modules:
        module.requires_grad_(train_encoder)
    losses = []
    train_supervised(
        plain.backbone,
        batches,
        steps=3,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_share=0.06,
        answer_weight=3.0,
        on_step=lambda step, loss: losses.append(loss),
    )
    rows = read_metrics(tmp_path / SFT_METRICS)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-3)
    moved = 0.0
    for (name, ours), theirs in zip(weights(policy).items(), weights(plain).values(), strict=True):
        assert float((ours - theirs).norm()) <= 1e-2 * float((theirs - start[name]).norm()) + 1e-7, name
        moved += float((theirs - start[name]).norm())
    assert moved > 0.1
    assert all("visual" not in n for n, p in weights(policy).items() if not torch.equal(p, start[n])) != train_encoder


def test_a_handful_of_steps_learns(phantom_records, tmp_path):
    policy = SparseVLM(build_nano(), NANO_SPEC)
    trainer(policy, tmp_path, phantom_records, steps=12, batch_size=8, learning_rate=3e-3).train()
    rows = read_metrics(tmp_path / SFT_METRICS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(adapted, nano, phantom_records, tmp_path):
    def make(folder, *callbacks):
        lora = None
        if adapted:
            from peft import LoraConfig

            lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
        policy = SparseVLM(fresh(nano), NANO_SPEC)
        return trainer(policy, folder, phantom_records, 4, callbacks, lora, save_steps=1, micro_batch_tokens=300)

    whole = make(tmp_path / "a")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b", Stop(3)).train()
    again = make(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    a, b = (dict(t.model.named_parameters()) for t in (whole, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [
        [{k: v for k, v in row.items() if k != "total_flos"} for row in read_metrics(tmp_path / name / SFT_METRICS)]
        for name in "ab"
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_micro_batches_change_nothing_but_rounding(nano, phantom_records, tmp_path):
    found = []
    for tokens in (100, 10**6):
        policy = SparseVLM(fresh(nano), NANO_SPEC)
        trainer(policy, tmp_path / str(tokens), phantom_records, steps=1, micro_batch_tokens=tokens).train()
        found.append([row["loss"] for row in read_metrics(tmp_path / str(tokens) / SFT_METRICS)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# --- records and images ----------------------------------------------------------------------------------------------


def test_records_of_an_image_follow_each_other_if_asked_for():
    records = [SimpleNamespace(image_paths=(name,)) for name in "abcabcaa"]
    plain = list(Ordered(records, 24, seed=3))
    assert sorted(plain[:8]) == sorted(plain[8:16]) == list(range(8))
    assert plain[:8] != plain[8:16]
    together = list(Ordered(records, 20, seed=3, by_image=True))
    assert len(together) == 20
    names = "".join(records[i].image_paths[0] for i in together[:8])
    assert sorted(len(list(group)) for _, group in itertools.groupby(names)) == [2, 2, 4]


def test_every_image_is_encoded_once_and_shared(nano, phantom_records, monkeypatch, tmp_path):
    twice = [*phantom_records[:3], *(copy.copy(r) for r in phantom_records[:3])]
    policy = SparseVLM(fresh(nano), NANO_SPEC)
    made = trainer(policy, tmp_path, twice, steps=4, batch_size=6, by_image=True)
    encode, seen = policy.backbone.encode, []
    monkeypatch.setattr(policy.backbone, "encode", lambda images: seen.append(len(images)) or encode(images))
    assert [len(lesson.exercises) for lesson in made.lessons(twice)] == [4, 4, 4]
    made.train()
    assert sum(seen) == 3


def test_a_record_of_two_images_teaches_with_both(nano, phantom_records, tmp_path):
    one, other = phantom_records[:2]
    text = f"<image><image>{one.question.removeprefix('<image>')}"
    both = Record("both", (*one.image_paths[:1], *other.image_paths[:1]), text, one.answer, one.boxes, one.meta)
    policy = SparseVLM(fresh(nano), VitosSpec())
    made = trainer(policy, tmp_path, [both, one], steps=1, batch_size=2)
    lessons = made.lessons([both, one])
    assert [len(lesson.images) for lesson in lessons] == [2, 1]
    of_two, of_one = ([e.target for e in lesson.exercises] for lesson in lessons)
    assert of_two == [target.replace("[[", "[[1, ") for target in of_one]  # with several images a box names its own
    assert made.train().global_step == 1


def test_visual_tokens_of_a_cache_give_the_same_training(nano, phantom_records, tmp_path):
    from vitos.scans.build import build_cache
    from vitos.scans.cache import EmbeddingCache

    images = [path for record in phantom_records for path in record.image_paths]
    build_cache(SparseVLM(fresh(nano), NANO_SPEC), images, tmp_path / "cache", confirm=lambda _: True)
    found = []
    for cached in (False, True):
        policy = SparseVLM(fresh(nano), NANO_SPEC)
        cache = EmbeddingCache.open(tmp_path / "cache", policy.backbone) if cached else None
        trainer(policy, tmp_path / str(cached), phantom_records, steps=2, cache=cache).train()
        found.append([row["loss"] for row in read_metrics(tmp_path / str(cached) / SFT_METRICS)])
    assert found[0] == found[1]


# --- what is trained -------------------------------------------------------------------------------------------------


def moved(nano, records, folder, **options):
    """Names of the weights that two updates change."""
    policy = SparseVLM(fresh(nano), VitosSpec())
    before = copy.deepcopy(policy.backbone.model.state_dict())
    trainer(policy, folder, records, steps=2, batch_size=2, **options).train()
    after = policy.backbone.model.state_dict()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


def test_it_trains_what_the_training_trains(nano, phantom_records, tmp_path):
    everything = moved(nano, phantom_records, tmp_path / "0", train_encoder=True)
    most = moved(nano, phantom_records, tmp_path / "1")
    assert most == {name for name in everything if "visual" not in name}
    assert most < everything
    some = moved(nano, phantom_records, tmp_path / "2", unfrozen_parameters=[r"layers\.1\.mlp"])
    assert some == {name for name in most if "layers.1.mlp" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_written_merged_and_alone_and_trained_on(nano, phantom_records, make_trainer, dtype, tmp_path):
    """The policy that was learned is the one that is saved, and the one that reinforcement learning starts from."""
    from peft import LoraConfig

    def adapters():
        return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")

    def logits(network, policy):
        query = Query(policy.encode(phantom_records[0].image_paths[0]), phantom_records[0].question)
        inputs = policy.backbone.model_inputs(pad_prompts([policy.branches.localize_prompt(query)], 0))
        with torch.no_grad():
            return copy.deepcopy(network).eval().float()(**inputs).logits

    SparseVLM(fresh(nano), NANO_SPEC).save_pretrained(tmp_path / "base")
    plain = SparseVLM.from_pretrained(tmp_path / "base", dtype=torch.float32, device="cpu")
    policy = SparseVLM.from_pretrained(tmp_path / "base", dtype=dtype, device="cpu")
    start = logits(policy.backbone.model, plain)
    learner = trainer(policy, tmp_path / "sft", phantom_records, 4, lora=adapters(), learning_rate=1e-4)
    learner.train()
    learner.write(tmp_path / "warm_start", tmp_path / "adapter")
    learnt = logits(learner.model, plain)
    change = float((learnt - start).norm())
    assert change > 1e-3
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "warm_start", dtype="auto")
    assert merged.dtype == torch.float32
    assert float((logits(merged, plain) - learnt).norm()) < 0.01 * change
    again = SparseVLM.from_pretrained(tmp_path / "base", dtype=dtype, device="cpu")
    rl = make_trainer(again, tmp_path / "rl", lora=adapters(), adapters=tmp_path / "adapter", kl_beta=0.1)
    assert float((logits(rl.model, plain) - learnt).norm()) < 1e-5 * change
    assert float((logits(rl.update.initial.backbone.model, plain) - learnt).norm()) < 1e-5 * change  # the reference
    assert all(p.requires_grad == (".lora_" in name) for name, p in rl.model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_with_activations_computed_again_get_the_same_gradients(
    dtype, nano, phantom_records, recorder, tmp_path
):
    """Also behind dropout, and with the frozen embeddings in front of the checkpointed layers."""
    from peft import LoraConfig

    found, passes = [], []
    for checkpointing in (False, True):
        policy, seen = SparseVLM(fresh(nano), NANO_SPEC), recorder()
        policy.backbone.model.to(dtype)
        layer = policy.backbone.model.model.get_decoder().layers[0].self_attn
        layer.register_forward_hook(lambda *_, own=passes, way=checkpointing: own.append(way))
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
        options = {"gradient_checkpointing": checkpointing, "micro_batch_tokens": 300}
        trainer(policy, tmp_path / str(checkpointing), phantom_records, 2, [seen], lora, **options).train()
        found.append(seen.gradients)
    assert passes.count(True) == 2 * passes.count(False) > 4
    for kept, again in zip(*found, strict=True):
        assert kept.keys() == again.keys()
        assert all(".lora_" in name for name in kept)
        assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert max(float(gradient.abs().max()) for gradient in found[0][1].values()) > 0


def test_what_does_not_go_together_is_refused(nano, phantom_records, tmp_path):
    policy = SparseVLM(fresh(nano), NANO_SPEC)
    with pytest.raises(ValueError, match="train_encoder does not go with adapters"):
        trainer(policy, tmp_path, phantom_records, lora=object(), train_encoder=True)
    with pytest.raises(ValueError, match="adapters freeze all weights"):
        trainer(policy, tmp_path, phantom_records, lora=object(), unfrozen_parameters="norm")


def test_updates_that_are_not_finite_are_left_out_until_they_are_too_many(nano, phantom_records, tmp_path):
    policy = SparseVLM(fresh(nano), NANO_SPEC)
    policy.backbone.model.model.language_model.norm.weight.data.fill_(float("inf"))
    made = trainer(policy, tmp_path, phantom_records, max_skipped_updates=1)
    with pytest.raises(FloatingPointError, match="2 such updates in a row"):
        made.train()


# --- the plain loop of the scripts -----------------------------------------------------------------------------------


def test_the_plain_loop_refuses(nano, picture):
    lesson = Lesson((), (Exercise("It is a cyst.", "A"),))
    with pytest.raises(ValueError, match="ran out after 1 of 3 steps"):
        train_supervised(fresh(nano), [[lesson]], steps=3, learning_rate=1e-4)
    broken = fresh(nano)
    broken.model.model.language_model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="the loss of step 1 is"):
        train_supervised(broken, [[lesson]], steps=1, learning_rate=1e-4)
