"""The timing of a training step: the unshared reference computes the same thing, and figures are what they say."""

import copy
import importlib.metadata
import io
import json

import numpy as np
import pytest
import torch
from benchmarks import train_step
from benchmarks.train_dual import OwnPromptsEngine, UnsharedEngine
from benchmarks.train_turns import Meter
from rich.console import Console

from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine


@pytest.fixture
def prompts(nano, picture):
    with torch.no_grad():
        visuals = nano.encode([picture(64, 40), picture(33, 97)])
    return [nano.build_prompt(f"<image>What? {'x ' * n}", [v]) for n, v in enumerate(visuals)]


def test_the_unshared_reference_gives_the_same_and_shares_nothing(nano, prompts, monkeypatch):
    engine, rows = OwnPromptsEngine(nano), []
    engine.meter = Meter()
    call = nano.model.forward
    monkeypatch.setattr(nano.model, "forward", lambda **k: rows.append(tuple(k["input_ids"].shape)) or call(**k))
    seeds, sampling, lengths = [[1, 2, 3], [4, 5]], Sampling(4, 1.0), [len(p) for p in prompts]
    sampled = engine.sample(prompts, sampling, seeds)
    assert rows[0] == (5, max(lengths))
    completions = [[c.token_ids for c in row] for row in sampled]
    rows.clear()
    with torch.no_grad():
        scores = engine.score(prompts, completions)
    assert rows == [(5, max(len(p) + len(ids) for p, row in zip(prompts, completions, strict=True) for ids in row))]
    assert engine.meter.prompt_tokens == 2 * (3 * lengths[0] + 2 * lengths[1])
    assert all(engine.meter.seconds[name] > 0 for name in ("sample", "score"))

    plain = TorchEngine(nano)
    expected = plain.sample(prompts, sampling, seeds)
    assert [[ids.tolist() for ids in row] for row in completions] == [
        [c.token_ids.tolist() for c in row] for row in expected
    ]
    with torch.no_grad():
        torch.testing.assert_close(scores.logprobs, plain.score(prompts, completions).logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_its_micro_batches_keep_to_the_same_budget(nano, prompts, budget):
    engine = OwnPromptsEngine(nano, max_batch_tokens=budget)
    completions = [[torch.full((n,), 20) for n in (3, 8, 5)], [torch.full((2,), 20)]]
    widths = [len(p) + max(map(len, row)) for p, row in zip(prompts, completions, strict=True)]
    batches = list(engine.score_batches(prompts, completions))
    assert sorted(i for batch in batches for i in batch) == [0, 1]
    for batch in batches:
        padded = sum(len(completions[i]) for i in batch) * max(widths[i] for i in batch)
        assert len(batch) == 1 or padded <= budget


def test_localizations_that_run_for_every_pair_give_the_same_scores_and_gradients(nano, prompts):
    engine, plain = UnsharedEngine(nano), TorchEngine(nano)
    engine.meter, engine.num_reasonings = Meter(), 3
    completions = [[torch.tensor([20, 21, 22]), torch.tensor([23])], [torch.tensor([24, 25])]]
    weight = nano.model.get_output_embeddings().weight

    def gradient(scores):
        nano.model.zero_grad()
        (scores.logprobs * torch.arange(1.0, 4.0)[:, None]).sum().backward()
        return weight.grad.clone()

    expected = plain.score(prompts, completions)
    for times in (3, 1):  # the first sampling of a step is that of localizations
        engine.sample(prompts, Sampling(2), [[0]] * 2)
        engine.meter.prompt_tokens = 0
        got = engine.score(prompts, completions)
        assert engine.meter.prompt_tokens == times * (2 * len(prompts[0]) + len(prompts[1]))
        assert torch.equal(got.mask, expected.mask)
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient(got), gradient(plain.score(prompts, completions)), rtol=1e-4, atol=1e-6)
        prompts = [copy.copy(prompt) for prompt in prompts]
    nano.model.zero_grad()


# --- figures --------------------------------------------------------------------------------------------------------


def steps(totals, prompt_tokens):
    parts = {"sample": 0.5, "score": 0.25, "backward": 0.125}
    return [
        {"total": t, **{k: t * v for k, v in parts.items()}, "prompt_tokens": prompt_tokens, "completion_tokens": 50}
        | {"peak_mib": 100 + t, "cpu": 2 * t}
        for t in totals
    ]


def test_ratios_are_medians_of_neighbours():
    """A machine that gets slower: the medians' ratio would be 2.25."""
    shared, other = steps([1.0, 2.0, 4.0], 10), steps([4.5, 6.0, 8.0], 80)
    found = train_step.summarize(other, shared)
    assert found["seconds"] == 6.0
    assert (found["time_ratio"], found["time_ratio_range"]) == (3.0, [2.0, 4.5])
    assert found["prompt_token_ratio"] == 8
    assert found["seconds_per_completion_token"] == 6.0 / 50
    assert (found["peak_mib"], found["cpu_seconds"]) == (108, 12.0)
    assert found["other"] == pytest.approx(6.0 / 8)


def made_up():
    """Results of a run in which the shared step takes G^1.5 seconds and the unshared one G^2; TRL is missing."""
    rows = []
    for group in (2, 4, 8):
        shared = train_step.summarize(steps([group**1.5] * 3, 10), steps([group**1.5] * 3, 10))
        rows.append({"shape": "nano", "group": group, "way": "shared", **shared})
        other = train_step.summarize(steps([group**2.0] * 3, 10 * group), steps([group**1.5] * 3, 10))
        rows.append({"shape": "nano", "group": group, "way": "unshared", **other})
        rows.append({"shape": "nano", "group": group, "way": "trl", "missing": "trl not installed"})
    return {
        "settings": {"questions": 1, "tokens": 5, "repeats": 3},
        "machine": train_step._machine(0.0),
        "rows": rows,
        "exponents": train_step._exponents(rows),
    }


def test_exponents_tables_and_files(tmp_path):
    results = made_up()
    assert results["exponents"]["nano"] == pytest.approx({"shared": 1.5, "unshared": 2.0})
    train_step.write(results, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    table = (tmp_path / "new" / "table.md").read_text()
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {len(train_step.HEADER) + 1}
    assert "| nano | 8 | trl | trl not installed |" in table
    assert "G^1.50 (shared), G^2.00 (unshared)" in table
    assert "unshared runs 8.0 times the prompt tokens and takes 2.83 times the time per completion token" in table
    assert train_step.render(results).row_count == 9
    screen = Console(width=80, file=io.StringIO())
    screen.print(train_step.render(results | {"rows": [row | {"shape": "qwen2.5-vl"} for row in results["rows"]]}))
    assert "…" not in screen.file.getvalue()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "trl not installed: pip install"),
        ("1.15.2", "trl 1.15.2 is not >= 1.16"),
        ("2.0", "2.0"),
        ("1.16", None),
    ],
)
def test_trl_is_measured_in_the_versions_that_are_known(version, said, monkeypatch):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    problem = train_step.trl_problem()
    assert (problem is None) == (said is None)
    assert said is None or said in problem


def test_refusals():
    for wrong, said in (({"shapes": ("huge",)}, "no shape 'huge'"), ({"groups": (1,)}, "groups must be >= 2")):
        with pytest.raises(ValueError, match=said):
            train_step.TrainBench(**wrong)


@pytest.mark.slow
def test_a_small_measurement(monkeypatch):
    """Real processes: G = K = 2 on nano, without TRL, whose row says so."""
    monkeypatch.setattr(train_step, "trl_problem", lambda: "trl not installed")
    seen = []
    bench = train_step.TrainBench(shapes=("nano",), groups=(2,), tokens=3, repeats=1)
    results = train_step.measure(bench, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]
    shared, own, unshared, trl = results["rows"]
    assert trl["missing"]
    # 1 localization prompt for 2 completions and 2 reasoning prompts for 4; sampled from and scored.
    assert own["prompt_tokens"] == 2 * shared["prompt_tokens"]
    # Of six prompts two are localizations, which run once more to be scored.
    assert unshared["prompt_tokens"] - own["prompt_tokens"] == pytest.approx(shared["prompt_tokens"] / 3, rel=0.1)
    assert {row["completion_tokens"] for row in (shared, own, unshared)} == {(2 + 4) * 3}
    for row in (shared, own, unshared):
        assert all(row[name] > 0 for name in train_step.STAGES)
        assert row["seconds"] == pytest.approx(sum(row[name] for name in (*train_step.STAGES, "other")))
        assert row["peak_mib"] > 50
    assert np.isfinite(results["machine"]["load_before"])


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path):
    job = train_step.Job("nano", "shared", 2, 1, 0, 16, 2)  # completions of no token
    with (
        pytest.raises(RuntimeError, match=r"the shared step of nano with G = K = 2 failed:(.|\n)*max_\w+_tokens"),
        train_step._worker(job, tmp_path) as step,
    ):
        step()
