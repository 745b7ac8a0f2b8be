"""Tiny training runs, and policy gradients by brute force."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import RewardWeights
from vitos.rl.trainer import DualStreamTrainer

TEMPERATURE = 1.4  # keeps good and bad rollouts mixed, whatever exactly the warm start learned


class Recorder(TrainerCallback):
    """Gradients before every optimizer step, as {name: tensor}."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture(scope="session")
def make_trainer(phantom_records):
    """`make_trainer(policy, folder, **options)`: two questions of 2 x 2 rollouts an update, gradients not clipped."""

    def make(
        policy,
        folder,
        callbacks=(),
        lora=None,
        records=phantom_records,
        weights=RewardWeights(),
        judge=None,
        adapters=None,
        **options,
    ):
        defaults = {
            "localization_steps": 1,
            "reasoning_steps": 1,
            "questions_per_step": 2,
            "num_localizations": 2,
            "num_reasonings": 2,
            "max_localization_tokens": 24,
            "max_reasoning_tokens": 14,
            "temperature": TEMPERATURE,
            "learning_rate": 1e-3,
            "max_grad_norm": 1e9,
            "skip_equal_outcomes": False,
            "seed": 3,
            "save_steps": 1000,
            "log_samples_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        config = DualStreamConfig(output_dir=str(folder), **defaults | options)
        return DualStreamTrainer(
            policy,
            config,
            records,
            reward_weights=weights,
            lora=lora,
            adapters=adapters,
            callbacks=callbacks,
            judge=judge,
        )

    return make


@pytest.fixture(scope="session")
def samples():
    """`samples(run, step)`: the texts of an update, as written in the run's folder."""
    return lambda run, step: json.loads((run / "samples" / f"step-{step}.json").read_text())


@pytest.fixture(scope="session")
def full_logprobs():
    """`full_logprobs(backbone, prompt, ids)`: one full forward pass, no cache, no padding, no sharing; shape (L,)."""

    def make(backbone, prompt, ids):
        end = prompt.next_position + torch.arange(len(ids))
        positions = torch.cat([prompt.position_ids, end.expand(3, -1)], dim=1)[:, None]
        features = BaseModelOutputWithPooling(pooler_output=(prompt.embeddings,))
        out = backbone.model(
            input_ids=torch.cat([prompt.input_ids, ids])[None],
            attention_mask=torch.ones(1, len(prompt) + len(ids), dtype=torch.long),
            position_ids=positions,
            mm_encoder_outputs={"image": features},
            use_cache=False,
        )
        logits = out.logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
        logits[:, list(backbone.banned_token_ids)] = -torch.inf
        return logits.log_softmax(-1)[torch.arange(len(ids)), ids]

    return make


@pytest.fixture(scope="session")
def brute_gradients(full_logprobs):
    """`brute_gradients(policy, batch)`: both branches' gradients, docs/method.md, section 9, taken literally.

    O_i is run K times, once with each A_ij; every completion has its own full forward pass; the mean over tokens
    counts each of the K. On policy, so that nothing is clipped.
    """

    def gradient(policy, terms):
        parameters = [(n, p) for n, p in policy.backbone.model.named_parameters() if p.requires_grad]
        total, tokens = 0.0, 0
        for prompt, completion, advantage in terms:
            new = full_logprobs(policy.backbone, prompt, completion.token_ids)
            ratio = (new - new.detach()).exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()
            tokens += len(completion.token_ids)
        found = torch.autograd.grad(total / tokens, [p for _, p in parameters], allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}

    def make(policy, batch):
        for module in policy.backbone.vision_modules:
            module.requires_grad_(False)
        localization, reasoning = [], []
        for p, group in enumerate(batch.groups):
            r, s = group.rewards.localization, group.rewards.reasoning
            a = (r - r.mean()) / (r.std() + 1e-4)
            b = (s - s.mean()) / (s.std() + 1e-4)
            for i, rollout in enumerate(group.localizations):
                prompt = batch.reason_prompts[p * len(group.localizations) + i]
                for j, answer in enumerate(group.reasonings[i]):
                    localization.append((batch.localize_prompts[p], rollout.completion, float(a[i, j])))
                    reasoning.append((prompt, answer.completion, float(b[i, j])))
        return SimpleNamespace(
            localization=gradient(policy, localization), reasoning=gradient(policy, reasoning), batch=batch
        )

    return make


@pytest.fixture(scope="session")
def recorder():
    return Recorder
