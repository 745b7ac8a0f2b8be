"""The trainer against brute-force gradients, and runs that stop and go on."""

import copy
import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

from vitos.engines.base import Sampling, derive_seed
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.callbacks import read_metrics
from vitos.rl.checkpoint import CheckpointError
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

PLAN = RolloutOptions(
    num_localizations=2, num_reasonings=2, localize=Sampling(24, 1.4), reason=Sampling(14, 1.4), seed=3
)


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def same_direction(found, expected, tolerance=1e-4):
    """`found` holds the trained parameters that have a gradient; the others' gradients must be 0."""
    found = {name: found.get(name, torch.zeros_like(value)) for name, value in expected.items()}
    a, b = flat(found), flat(expected)
    assert float(b.norm()) > 1e-3, "a gradient of zero shows nothing"
    assert float((a - b).norm() / b.norm()) < tolerance


def combine(a, b, x=1.0, y=1.0):
    return {name: x * a[name] + y * b[name] for name in a}


def again(policy, records, rows, step, plan=PLAN):
    """The rollouts of an update, drawn again from the ids in its samples."""
    chosen = [next(r for r in records if r.id == row["id"]) for row in rows]
    return roll_out(policy, chosen, ScanStore(policy).get(chosen), step, plan, RewardWeights())


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def expected(make_trainer, warm_policy, clone_policy, phantom_records, samples, brute_gradients, tmp_path_factory):
    """Brute-force gradients of the first update; its questions depend on the seed only."""
    run = tmp_path_factory.mktemp("first")
    make_trainer(clone_policy(warm_policy), run, schedule="localization-only").train()
    policy = clone_policy(warm_policy)
    return brute_gradients(policy, again(policy, phantom_records, samples(run, 1), 0))


# --- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "x", "y"),
    [("staged", 1, 0), ("reversed", 0, 1), ("localization-only", 1, 0), ("reasoning-only", 0, 1), ("joint", 1, 1)],
)
def test_first_update_has_the_gradient_of_the_named_branches(
    schedule, x, y, expected, make_trainer, warm_policy, clone_policy, recorder, tmp_path
):
    """Against full passes of every O_i repeated K times; micro-batches of one prompt each."""
    seen = recorder()
    policy = clone_policy(warm_policy)
    before = {n: p.clone() for n, p in policy.backbone.model.named_parameters()}
    make_trainer(policy, tmp_path, [seen], schedule=schedule, micro_batch_tokens=1).train()
    same_direction(seen.gradients[0], combine(expected.localization, expected.reasoning, x, y))
    vision = {n for n in before if ".visual." in n}
    assert vision
    assert not any(name in vision for gradients in seen.gradients for name in gradients)
    for name, value in policy.backbone.model.named_parameters():
        assert torch.equal(value, before[name]) == (name in vision), name
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert ("clipped/localization" in rows[0]) == bool(x)
    assert ("clipped/reasoning" in rows[0]) == bool(y)
    if schedule == "joint":
        cosine = torch.cosine_similarity(flat(expected.localization), flat(expected.reasoning), dim=0)
        assert rows[0]["gradient_cosine"] == pytest.approx(float(cosine), abs=1e-4)
        for branch in ("localization", "reasoning"):
            norm = float(flat(getattr(expected, branch)).norm())
            assert rows[0][f"gradient_norm/{branch}"] == pytest.approx(norm, rel=1e-3)
    else:
        assert "gradient_cosine" not in rows[0]


def test_alternating_takes_turns_and_measuring_the_cosine_changes_nothing(
    expected, make_trainer, warm_policy, clone_policy, recorder, tmp_path
):
    runs = {}
    for every in (0, 1):
        seen = recorder()
        make_trainer(
            clone_policy(warm_policy),
            tmp_path / str(every),
            [seen],
            schedule="alternating",
            log_gradient_cosine_steps=every,
        ).train()
        runs[every] = seen, read_metrics(tmp_path / str(every) / "metrics.jsonl")
    plain, measured = runs[0], runs[1]
    same_direction(plain[0].gradients[0], expected.localization)
    assert ["clipped/localization" in row for row in plain[1]] == [True, False]
    assert ["clipped/reasoning" in row for row in plain[1]] == [False, True]
    for a, b in zip(plain[0].gradients, measured[0].gradients, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    cosine = torch.cosine_similarity(flat(expected.localization), flat(expected.reasoning), dim=0)
    assert measured[1][0]["gradient_cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert measured[1][0]["loss/policy"] == pytest.approx(plain[1][0]["loss/policy"])


def test_dense_trains_the_reasoning_branch_on_all_tokens(
    make_trainer, warm_policy, clone_policy, recorder, phantom_records, samples, brute_gradients, tmp_path
):
    seen = recorder()
    make_trainer(clone_policy(warm_policy), tmp_path, [seen], schedule="dense").train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["kept_ratio"] for row in rows] == [1.0, 1.0]
    assert all(row["fallback_rate"] == 0 and "clipped/localization" not in row for row in rows)
    plan = RolloutOptions(
        num_localizations=2, num_reasonings=2, localize=PLAN.localize, reason=PLAN.reason, seed=3, dense=True
    )
    policy = clone_policy(warm_policy)
    brute = brute_gradients(policy, again(policy, phantom_records, samples(tmp_path, 1), 0, plan))
    same_direction(seen.gradients[0], brute.reasoning)


def test_groups_without_a_difference_in_outcome_train_nothing(
    make_trainer, warm_policy, clone_policy, recorder, tmp_path
):
    """Answers and boxes cannot be read within 3 tokens: all are wrong, so no group says anything."""
    seen = recorder()
    policy = clone_policy(warm_policy)
    options = {"max_localization_tokens": 3, "max_reasoning_tokens": 3, "skip_equal_outcomes": True}
    make_trainer(policy, tmp_path, [seen], schedule="localization-only", **options).train()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["skipped_groups/localization"], row["fallback_rate"], row["truncated_rate"]) == (2, 1, 1)
    assert seen.gradients == [{}]


def test_stage_one_may_sample_more_boxes_and_fewer_answers(make_trainer, warm_policy, clone_policy, samples, tmp_path):
    sizes = {"stage1_num_localizations": 3, "stage1_num_reasonings": 1}
    make_trainer(clone_policy(warm_policy), tmp_path, **sizes).train()
    for step, sizes in ((1, [1, 1, 1]), (2, [2, 2])):
        for sample in samples(tmp_path, step):
            assert [len(row["reasonings"]) for row in sample["localizations"]] == sizes


# --- guards of stage 2 -----------------------------------------------------------------------------------------------


def test_share_mixes_both_gradients(
    make_trainer, warm_policy, clone_policy, recorder, phantom_records, samples, brute_gradients, tmp_path
):
    seen = recorder()
    make_trainer(clone_policy(warm_policy), tmp_path, [seen], localization_share=0.25).train()
    stage_one = SparseVLM.from_pretrained(tmp_path / "stage1", device="cpu")
    brute = brute_gradients(stage_one, again(stage_one, phantom_records, samples(tmp_path, 2), 1))
    same_direction(seen.gradients[1], combine(brute.localization, brute.reasoning, 0.25, 0.75))


@pytest.mark.parametrize("skip", [False, True])
def test_localization_kl_pulls_to_stage_one(
    make_trainer, warm_policy, clone_policy, recorder, phantom_records, samples, full_logprobs, tmp_path, skip
):
    """Stage 2 begins on the stage-1 policy: no pull at its first update, the gradient of the k3 KL at its second.

    It acts on all localizations, also on those of questions that the rewards say nothing about (`skip`).
    """
    runs = {}
    for weight in (0.0, 5.0):
        seen, run = recorder(), tmp_path / str(weight)
        policy = clone_policy(warm_policy)
        options = {"reasoning_steps": 2, "save_steps": 1, "skip_equal_outcomes": skip, "log_gradient_cosine_steps": 1}
        make_trainer(policy, run, [seen], localization_kl=weight, **options).train()
        runs[weight] = seen.gradients, read_metrics(run / "metrics.jsonl")
    (free, free_rows), (guarded, rows) = runs.values()
    assert free_rows[1]["reference_kl/localization"] == 0
    # The cosine is of the rewards' gradients: a guard changes nothing about it.
    assert rows[2]["gradient_cosine"] == pytest.approx(free_rows[2]["gradient_cosine"], abs=1e-5)
    assert rows[1]["reference_kl/localization"] == pytest.approx(0, abs=1e-9)
    assert rows[2]["reference_kl/localization"] > 0
    same_direction(guarded[1], free[1])

    # Both runs are at the same weights at their last update; what differs is 5 x the gradient of the mean k3.
    run = tmp_path / "5.0"
    now = SparseVLM.from_pretrained(run / "checkpoint-2", device="cpu")
    reference = SparseVLM.from_pretrained(run / "stage1", device="cpu")
    for module in now.backbone.vision_modules:
        module.requires_grad_(False)
    batch = again(now, phantom_records, samples(run, 3), 2)
    total, tokens = 0.0, 0
    for prompt, group in zip(batch.localize_prompts, batch.groups, strict=True):
        for rollout in group.localizations:
            ids = rollout.completion.token_ids
            with torch.no_grad():
                known = full_logprobs(reference.backbone, prompt, ids)
            gap = known - full_logprobs(now.backbone, prompt, ids)
            total, tokens = total + (gap.exp() - gap - 1).sum(), tokens + len(ids)
    assert rows[2]["reference_kl/localization"] == pytest.approx(total.item() / tokens, rel=1e-3)
    named = [(n, p) for n, p in now.backbone.model.named_parameters() if p.requires_grad]
    kl = dict(zip((n for n, _ in named), torch.autograd.grad(5 * total / tokens, [p for _, p in named]), strict=True))
    same_direction(combine(guarded[2], free[2], 1, -1), kl, tolerance=5e-3)


def test_frozen_boxes_are_written_by_stage_one(
    make_trainer, warm_policy, clone_policy, phantom_records, samples, tmp_path
):
    options = {"frozen_boxes": True, "reasoning_steps": 2, "save_steps": 1, "learning_rate": 0.003}
    make_trainer(clone_policy(warm_policy), tmp_path, **options).train()
    rows = samples(tmp_path, 3)
    chosen = [next(r for r in phantom_records if r.id == row["id"]) for row in rows]

    def boxes_by(folder):
        policy = SparseVLM.from_pretrained(folder, device="cpu")
        queries = [Query(s, r.question) for s, r in zip(ScanStore(policy).get(chosen), chosen, strict=True)]
        seeds = [[derive_seed(3, 2, r.id, "localization", i) for i in range(2)] for r in chosen]
        rolled = policy.localize(queries, PLAN.localize, seeds)
        return [[rollout.completion.text for rollout in row] for row in rolled]

    written = [[entry["text"] for entry in row["localizations"]] for row in rows]
    assert written == boxes_by(tmp_path / "stage1")
    assert written != boxes_by(tmp_path / "checkpoint-2")


# --- stop and go on --------------------------------------------------------------------------------------------------

# Eight questions, two an update: an epoch ends after update 4; stage 2 begins with update 4 (after three).
RUN = {
    "localization_steps": 3,
    "reasoning_steps": 3,
    "lr_scheduler_type": "linear",
    "stage1_learning_rate": 5e-4,
    "save_total_limit": None,
}


class Stop(TrainerCallback):
    """Ctrl-C at an update: after its checkpoint is written ("save") or when its figures are ("log")."""

    def __init__(self, event, step):
        self.event, self.step = event, step

    def on_save(self, args, state, control, **kwargs):
        self._stop("save", state)

    def on_log(self, args, state, control, **kwargs):
        self._stop("log", state)

    def _stop(self, event, state):
        if (event, state.global_step) == (self.event, self.step):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(make_trainer, warm_policy, clone_policy, tmp_path_factory):
    """An uninterrupted run, with its trained policy."""
    run = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(clone_policy(warm_policy), run, save_steps=1, **RUN)
    trainer.train()
    return run, trainer


def series(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds/", "memory/")) and k != "total_flos"}
        for row in rows
    ]


@pytest.mark.parametrize(
    ("event", "step", "save_steps"),
    [
        pytest.param("save", 2, 1, id="within stage and epoch"),
        pytest.param("save", 3, 1, id="at the change of stage"),
        pytest.param("save", 4, 1, id="after the change of stage, at the end of an epoch"),
        pytest.param("log", 5, 2, id="one update behind a checkpoint"),
        pytest.param("log", 1, 2, id="before the first checkpoint"),
        pytest.param("save", 6, 3, id="all updates done, final model not written"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    event, step, save_steps, whole, make_trainer, warm_policy, clone_policy, tmp_path
):
    options = RUN | {"save_steps": save_steps}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(clone_policy(warm_policy), tmp_path, [Stop(event, step)], **options).train()
    assert not (tmp_path / "model").exists()
    # What a kill leaves behind: a folder without the mark of completeness, and one still under its own name.
    (tmp_path / "checkpoint-5" if step < 5 else tmp_path / "checkpoint-99").mkdir()
    (tmp_path / ".checkpoint-6.partial").mkdir()

    make_trainer(clone_policy(warm_policy), tmp_path, **options).train(resume_from_checkpoint=True)
    expected_run, _ = whole
    assert [row["step"] for row in series(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert series(tmp_path) == series(expected_run)
    for folder in ("model", "stage1"):
        ours, theirs = weights_of(tmp_path / folder), weights_of(expected_run / folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), folder


def test_stages_have_their_own_schedule_and_optimizer(whole):
    run, _ = whole
    rates = [row["learning_rate"] for row in series(run)]
    falling = np.array([1, 2 / 3, 1 / 3])
    np.testing.assert_allclose(rates, np.concatenate([5e-4 * falling, 1e-3 * falling]))
    assert [row["stage"] for row in series(run)] == [1, 1, 1, 2, 2, 2]
    counts = []
    for step in range(1, 7):
        state = torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        (count,) = {int(value["step"]) for value in state.values()}
        counts.append(count)
    assert counts == [1, 2, 3, 1, 2, 3]
    stage_one, third = weights_of(run / "stage1"), weights_of(run / "checkpoint-3")
    assert all(torch.equal(stage_one[name], third[name]) for name in stage_one)


def test_final_model_is_an_ordinary_checkpoint(whole, phantom_records, warm_policy):
    run, trainer = whole
    model, problems = AutoModelForImageTextToText.from_pretrained(run / "model", output_loading_info=True)
    assert not any(problems.values()), problems
    policy = trainer.policy
    prompt = policy.branches.localize_prompt(
        Query(ScanStore(policy).get(phantom_records[:1])[0], phantom_records[0].question)
    )
    from vitos.core.prompt import pad_prompts

    inputs = policy.backbone.model_inputs(pad_prompts([prompt], 0))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, policy.backbone.model.eval()(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, warm_policy.backbone.model(**inputs).logits)
    assert SparseVLM.from_pretrained(run / "model", device="cpu").spec.localize_prompt == policy.spec.localize_prompt


@pytest.mark.parametrize("resume", [None, False])
def test_a_folder_with_checkpoints_is_refused(resume, whole, make_trainer, warm_policy, clone_policy, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = make_trainer(clone_policy(warm_policy), tmp_path)
    with pytest.raises(FileExistsError, match=r"holds checkpoint-2; pass --resume"):
        trainer.train(resume_from_checkpoint=resume)
    (tmp_path / "checkpoint-2" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-2 is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_full_disk_leaves_the_earlier_checkpoint(make_trainer, warm_policy, clone_policy, monkeypatch, tmp_path):
    """The second checkpoint does not fit; after that there is room again and the run goes on."""
    real = os.replace

    def full(source, target):
        if str(target).endswith("checkpoint-2"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    options = {"schedule": "localization-only", "localization_steps": 3, "save_steps": 1}
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written \(.*No space left"):
        make_trainer(clone_policy(warm_policy), tmp_path, **options).train()
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-1"]
    monkeypatch.undo()
    make_trainer(clone_policy(warm_policy), tmp_path, **options).train(resume_from_checkpoint=True)
    assert [row["step"] for row in series(tmp_path)] == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_cut_off_checkpoint_costs_its_updates_and_says_so(
    whole, make_trainer, warm_policy, clone_policy, caplog, tmp_path
):
    """The newest one has its mark, but not all of its bytes: the one before is taken."""
    expected_run, _ = whole
    for name in ("checkpoint-4", "checkpoint-5", "stage1"):
        shutil.copytree(expected_run / name, tmp_path / name)
    shutil.copy(expected_run / "metrics.jsonl", tmp_path)
    os.truncate(tmp_path / "checkpoint-5" / "optimizer.pt", 1000)
    make_trainer(clone_policy(warm_policy), tmp_path, save_steps=1, **RUN).train(resume_from_checkpoint=True)
    said = r"checkpoint-5 cannot be used: optimizer.pt has 1000 of \d+ bytes; training goes on from checkpoint-4"
    assert re.search(said, caplog.text)
    assert series(tmp_path) == series(expected_run)
    ours, theirs = weights_of(tmp_path / "model"), weights_of(expected_run / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


# --- adapters, refusals ----------------------------------------------------------------------------------------------


def test_lora_trains_adapters_only_and_merges_them(
    make_trainer, warm_policy, clone_policy, recorder, phantom_records, samples, tmp_path
):
    from peft import LoraConfig

    seen = recorder()
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", bias="none")
    options = {"localization_kl": 0.1, "localization_steps": 2, "learning_rate": 0.01, "save_steps": 1}
    policy = clone_policy(warm_policy)
    make_trainer(policy, tmp_path, [seen], lora=lora, **options).train()
    names = [name for gradients in seen.gradients for name in gradients]
    assert names
    assert all(".lora_" in name and ".visual." not in name and "lm_head" not in name for name in names)

    start = warm_policy.backbone.model.state_dict()
    for folder in ("stage1", "model"):
        model, problems = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(problems.values()), (folder, problems)
        changed = {n for n, value in model.state_dict().items() if not torch.equal(value, start[n])}
        assert changed
        assert all("language_model.layers" in name and "proj" in name for name in changed), folder
    # The reference of the guard is the policy that stage 1 left: no KL at the first update of stage 2.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[2]["reference_kl/localization"] == pytest.approx(0, abs=1e-6)
    # What the merged stage-1 policy writes at that update is what the adapters wrote.
    stage_one = SparseVLM.from_pretrained(tmp_path / "stage1", device="cpu")
    batch = again(stage_one, phantom_records, samples(tmp_path, 3), 2)
    texts = [[r.completion.text for r in group.localizations] for group in batch.groups]
    assert texts == [[entry["text"] for entry in row["localizations"]] for row in samples(tmp_path, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adapters_learnt_is_in_the_saved_weights(make_trainer, warm_policy, tmp_path, dtype):
    """Small steps on bfloat16 weights: merged in bfloat16 nothing of them would be left."""
    from peft import LoraConfig

    from vitos.core.prompt import pad_prompts

    warm_policy.save_pretrained(tmp_path / "warm")
    policy = SparseVLM.from_pretrained(tmp_path / "warm", dtype=dtype, device="cpu")
    before = copy.deepcopy(policy.backbone.model).float()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    options = {"localization_steps": 2, "reasoning_steps": 2, "learning_rate": 1e-5}
    trainer = make_trainer(policy, tmp_path, lora=lora, **options)
    trainer.train()
    adapted = copy.deepcopy(trainer.model).float()
    network = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert network.dtype == torch.float32
    records, fresh = trainer.update.dataset[:1], SparseVLM.from_pretrained(tmp_path / "model", device="cpu")
    scan = fresh.encode(records[0].image_paths[0])
    prompt = fresh.branches.localize_prompt(Query(scan, records[0].question))
    inputs = fresh.backbone.model_inputs(pad_prompts([prompt], 0))
    with torch.no_grad():
        start, learnt, saved = (model.eval()(**inputs).logits for model in (before, adapted, network))
    assert (learnt - start).abs().max() > 1e-5
    assert (saved - learnt).norm() < 0.01 * (learnt - start).norm()


def test_lora_run_goes_on_from_its_checkpoint(make_trainer, warm_policy, clone_policy, tmp_path):
    from peft import LoraConfig

    options = {"schedule": "localization-only", "localization_steps": 2, "save_steps": 1, "learning_rate": 0.01}

    def trainer(folder, *callbacks):
        torch.manual_seed(0)  # of the adapters' first weights
        lora = LoraConfig(r=4, target_modules="all-linear")
        return make_trainer(clone_policy(warm_policy), folder, callbacks, lora=lora, **options)

    trainer(tmp_path / "a").train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", Stop("save", 1)).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    assert series(tmp_path / "a") == series(tmp_path / "b")
    a, b = weights_of(tmp_path / "a" / "model"), weights_of(tmp_path / "b" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_too_few_questions_are_refused(make_trainer, warm_policy, phantom_records, tmp_path):
    with pytest.raises(ValueError, match="1 training questions do not fill one update of 2"):
        make_trainer(warm_policy, tmp_path, records=phantom_records[:1])


def test_only_weights_that_a_pattern_names_are_trained(make_trainer, warm_policy, clone_policy, tmp_path):
    policy = clone_policy(warm_policy)
    before = {name: weight.clone() for name, weight in policy.backbone.model.state_dict().items()}
    make_trainer(policy, tmp_path, unfrozen_parameters=[r"layers\.1\.mlp", r"language_model\.norm"]).train()
    after = policy.backbone.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    mlp = {f"model.language_model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert moved == mlp | {"model.language_model.norm.weight"}


def test_patterns_that_name_no_weight_are_refused(make_trainer, warm_policy, clone_policy, tmp_path):
    for pattern, words in (
        ("layers.99", r"'layers.99' is in the name of no weight that is trained; names look like model\."),
        ("visual", "no weight that is trained"),  # the encoder, which is frozen
        ("layers.(", "not a regular expression"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(clone_policy(warm_policy), tmp_path, unfrozen_parameters=["norm", pattern])
    with pytest.raises(ValueError, match="adapters freeze all weights"):
        make_trainer(clone_policy(warm_policy), tmp_path, unfrozen_parameters="norm", lora=object())


def test_adapters_that_drop_values_are_refused_where_activations_are_computed_again(
    make_trainer, warm_policy, tmp_path, monkeypatch
):
    from peft import LoraConfig

    # What `accelerate launch` makes of a configuration with `fsdp_activation_checkpointing: true`.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match=r"dropout 0\.1 gives wrong gradients with FSDP's activation_checkpointing"):
        make_trainer(warm_policy, tmp_path, lora=LoraConfig(lora_dropout=0.1))


def test_plans_that_reasoning_is_not_trained_for_are_refused(make_trainer, warm_policy, tmp_path):
    with pytest.raises(ValueError, match="no model can be trained under plan crop"):
        make_trainer(warm_policy.with_spec(plan="crop"), tmp_path)
    with pytest.raises(ValueError, match="schedule: dense does not go with plan coarse"):
        make_trainer(warm_policy.with_spec(plan="coarse"), tmp_path, schedule="dense")


@pytest.mark.parametrize("plan", ["gather", "coarse"])
def test_an_update_under_a_plan_scores_what_was_sampled(make_trainer, warm_policy, clone_policy, plan, tmp_path):
    policy = clone_policy(warm_policy).with_spec(plan=plan)
    trainer = make_trainer(policy, tmp_path, schedule="reasoning-only", reasoning_steps=1)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "mismatch_kl/reasoning" in row]
    assert row["prompts/reasoning"] > 0
    assert abs(row["mismatch_kl/reasoning"]) < 1e-5
    assert SparseVLM.from_pretrained(tmp_path / "model", device="cpu").spec.plan == plan


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_updates_that_are_not_finite_are_left_out_until_they_are_too_many(
    where, make_trainer, warm_policy, clone_policy, monkeypatch, tmp_path
):
    """The second of four updates is broken, then all: weights and moments stay as they were."""
    from vitos.rl import update as module

    real, broken = module.policy_loss, {2}
    policy = clone_policy(warm_policy)
    options = {"schedule": "localization-only", "localization_steps": 4, "save_steps": 1, "save_total_limit": None}
    trainer = make_trainer(policy, tmp_path, max_skipped_updates=1, micro_batch_tokens=10**6, **options)

    def sometimes(inputs, **kwargs):
        out = real(inputs, **kwargs)
        if trainer.state.global_step + 1 not in broken:
            return out
        # The root of a square has no finite gradient at 0, but a value.
        loss = out.loss * math.nan if where == "loss" else out.loss + (out.loss - out.loss.detach()).square().sqrt()
        return replace(out, loss=loss)

    monkeypatch.setattr(module, "policy_loss", sometimes)
    trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped_update"] for row in rows] == [0, 1, 0, 0]
    first, second, third = (weights_of(tmp_path / f"checkpoint-{n}") for n in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {int(value["step"]) for value in state.values()} == {3}

    broken |= {1, 3}
    again = make_trainer(clone_policy(warm_policy), tmp_path / "again", max_skipped_updates=1, **options)
    trainer = again
    with pytest.raises(FloatingPointError, match=r"the loss of update 2 is .*\['train/.*2 such updates in a row"):
        again.train()


def test_weights_that_round_small_steps_away_are_warned_of(make_trainer, warm_policy, clone_policy, caplog, tmp_path):
    for dtype, rate, warned in (
        (torch.bfloat16, 1e-6, True),
        (torch.float32, 1e-6, False),
        (torch.bfloat16, 1e-3, False),
    ):
        policy = clone_policy(warm_policy)
        policy.backbone.model.to(dtype)
        caplog.clear()
        make_trainer(policy, tmp_path, learning_rate=rate)
        assert ("most steps of learning_rate 1e-06 round to nothing" in caplog.text) == warned


def test_samples_hold_the_texts_and_rewards_of_an_update(whole, phantom_records, samples):
    run, _ = whole
    rows = samples(run, 1)
    assert len(rows) == 2
    for row in rows:
        record = next(r for r in phantom_records if r.id == row["id"])
        assert (row["gold"], row["question"]) == (record.answer, record.question)
        assert [len(entry["reasonings"]) for entry in row["localizations"]] == [2, 2]
    rewards = [entry["rewards"] for row in rows for entry in row["localizations"]]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert np.mean(rewards) == pytest.approx(first["reward/localization"])


def test_sampling_has_a_budget_of_its_own(
    expected, clone_policy, warm_policy, make_trainer, recorder, tmp_path, monkeypatch
):
    """Batches of sampling and of scoring follow their own numbers; the update stays the same up to rounding."""
    rows = {"sample": [], "score": []}
    prefill, score = TorchEngine.prefill, TorchEngine.score
    monkeypatch.setattr(
        TorchEngine, "prefill", lambda self, p, x: rows["sample"].append(len(p)) or prefill(self, p, x)
    )
    monkeypatch.setattr(
        TorchEngine, "score", lambda self, p, c, t=1.0, **o: rows["score"].append(len(p)) or score(self, p, c, t, **o)
    )
    make_trainer(clone_policy(warm_policy), tmp_path / "a", micro_batch_tokens=1).train()
    one = {name: list(counts) for name, counts in rows.items()}
    assert set(one["sample"]) == set(one["score"]) == {1}
    for counts in rows.values():
        counts.clear()
    seen, policy = recorder(), clone_policy(warm_policy)
    budgets = {"micro_batch_tokens": 1, "sampling_batch_tokens": 10**6}
    make_trainer(policy, tmp_path / "b", [seen], schedule="localization-only", **budgets).train()
    assert set(rows["score"]) == {1}
    assert min(rows["sample"]) > 1
    same_direction(seen.gradients[0], expected.localization)
