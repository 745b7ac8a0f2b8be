"""Further questions in the place of silent ones: who is asked, in one process and in several, and what is learned."""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.config.options import DualStreamOptions
from vitos.config.yaml_file import ConfigError
from vitos.core.record import Record
from vitos.engines.base import Sampling
from vitos.rl import oversampling
from vitos.rl.callbacks import read_metrics
from vitos.rl.oversampling import further_questions, roll_out_until_full
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutBatch, RolloutOptions, roll_out
from vitos.scans.store import ScanStore


def records(count):
    return [Record(f"q{i}", (), "", "A") for i in range(count)]


# --- who is asked, without a model -----------------------------------------------------------------------------------


class Together:
    """Stands in for `parallel.gathered`: threads, one a process, wait for each other and share what they have."""

    def __init__(self, size):
        self.barrier, self.shelf, self.size = threading.Barrier(size, timeout=20), {}, size

    def __call__(self, accelerator, items):
        self.shelf[accelerator.process_index] = items
        self.barrier.wait()
        everything = [item for rank in range(self.size) for item in self.shelf[rank]]
        self.barrier.wait()
        return everything


def ask(dataset, batch, silent, rounds, processes):
    """Ids asked in each round by each process; `silent` questions have no signal."""
    asked = [[] for _ in range(processes)]
    share = len(batch) // processes

    def run(rank):
        def roll(questions):
            asked[rank].append([q.id for q in questions])
            return RolloutBatch(list(questions), [], [])

        parts = roll_out_until_full(
            SimpleNamespace(process_index=rank, num_processes=processes),
            batch[rank * share : (rank + 1) * share],
            roll,
            lambda groups: sum(question.id not in silent for question in groups),
            lambda known: further_questions(dataset, known, seed=5, step=7),
            rounds,
        )
        # An empty round is one that this process need not roll out.
        asked[rank] = [[question.id for question in part.groups] for part in parts]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({len(own) for own in asked}) == 1
    return asked


@given(
    st.integers(4, 30),
    st.sets(st.integers(0, 29)),
    st.integers(0, 5),
    st.sampled_from([1, 2, 4]),
)
def test_as_many_are_asked_as_are_lacking_whatever_the_number_of_processes(size, silent, rounds, processes):
    dataset, silent = records(size), {f"q{i}" for i in silent}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oversampling, "gathered", Together(processes))
        asked = ask(dataset, dataset[:4], silent, rounds, processes)
        patch.setattr(oversampling, "gathered", Together(1))
        (alone,) = ask(dataset, dataset[:4], silent, rounds, 1)
    together = [[ident for own in asked for ident in own[turn]] for turn in range(len(asked[0]))]
    assert together == alone

    flat = [ident for turn in alone for ident in turn]
    assert len(flat) == len(set(flat))  # no question twice
    assert len(alone) <= 1 + rounds
    lacking, left = 4, size
    for turn in alone:
        assert len(turn) == min(lacking, left)
        lacking -= sum(ident not in silent for ident in turn)
        left -= len(turn)
    # It ends for one of three reasons only.
    assert lacking == 0 or len(alone) == 1 + rounds or len(flat) == size


def test_the_order_is_the_updates_own():
    dataset = records(50)
    order = [r.id for r in further_questions(dataset, {"q3", "q4"}, seed=1, step=2)]
    assert sorted(order) == sorted({r.id for r in dataset} - {"q3", "q4"})
    assert order == [r.id for r in further_questions(dataset, {"q3", "q4"}, seed=1, step=2)]
    others = [[r.id for r in further_questions(dataset, (), seed=s, step=t)] for s, t in ((1, 3), (2, 2))]
    assert len({tuple(o) for o in [order, *others]}) == 3


def test_it_makes_no_sense_where_no_group_is_left_out():
    with pytest.raises(ConfigError, match=r"oversampling_rounds.*has no effect with train.skip_equal_outcomes: false"):
        DualStreamOptions(oversampling_rounds=1, skip_equal_outcomes=False).validate()


# --- training --------------------------------------------------------------------------------------------------------

OPTIONS = {
    "schedule": "reasoning-only",
    "reasoning_steps": 3,
    "questions_per_step": 4,
    "num_localizations": 1,  # two answers a question: they agree half of the time or more
    "skip_equal_outcomes": True,
    "oversampling_rounds": 2,
    "log_samples": 8,
    "save_steps": 1,
    "save_total_limit": None,
}


@pytest.fixture(scope="module")
def run(make_trainer, warm_policy, clone_policy, recorder, tmp_path_factory):
    """A run of three updates that look further, and their gradients."""
    folder, seen = tmp_path_factory.mktemp("oversampled"), recorder()
    make_trainer(clone_policy(warm_policy), folder, [seen], **OPTIONS).train()
    return folder, seen


def test_the_gradient_is_that_of_all_questions_with_a_signal(
    run, warm_policy, clone_policy, phantom_records, samples, brute_gradients
):
    """Against full passes; who is asked follows from the outcomes of a rollout drawn again."""
    folder, seen = run
    rows, metrics = samples(folder, 1), read_metrics(folder / "metrics.jsonl")
    asked = [next(r for r in phantom_records if r.id == row["id"]) for row in rows]
    policy = clone_policy(warm_policy)
    plan = RolloutOptions(
        num_localizations=1, num_reasonings=2, localize=Sampling(24, 1.4), reason=Sampling(14, 1.4), seed=3
    )
    batch = roll_out(policy, asked, ScanStore(policy).get(asked), 0, plan, RewardWeights())
    told = [len(set(group.rewards.terms["sparse_accuracy"].ravel().tolist())) > 1 for group in batch.groups]
    further = [r.id for r in further_questions(phantom_records, {r.id for r in asked[:4]}, seed=3, step=0)]
    assert not all(told[:4]), "every first question had a signal: this test needs another seed"
    expected = 4
    for _ in range(OPTIONS["oversampling_rounds"]):
        new = further[expected - 4 :][: 4 - sum(told[:expected])]
        assert [r.id for r in asked[expected : expected + len(new)]] == new
        expected += len(new)
    assert len(asked) == expected
    assert metrics[0]["oversampled_questions"] == expected - 4
    assert metrics[0]["unfilled_groups"] == 4 - sum(told)
    assert metrics[0]["skipped_groups/reasoning"] == len(told) - sum(told)
    assert any(told)

    loud = RolloutBatch(
        [group for group, tells in zip(batch.groups, told, strict=True) if tells],
        [prompt for prompt, tells in zip(batch.localize_prompts, told, strict=True) if tells],
        [prompt for prompt, tells in zip(batch.reason_prompts, told, strict=True) if tells],
    )
    brute = brute_gradients(policy, loud).reasoning
    found = seen.gradients[0]
    difference = sum((found.get(n, torch.zeros_like(g)) - g).square().sum() for n, g in brute.items()).sqrt()
    assert float(difference / sum(g.square().sum() for g in brute.values()).sqrt()) < 1e-4


def test_a_resumed_run_asks_the_same(run, make_trainer, warm_policy, clone_policy, tmp_path):
    folder, _ = run
    for name in ("checkpoint-1", "metrics.jsonl"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    make_trainer(clone_policy(warm_policy), tmp_path, **OPTIONS).train(resume_from_checkpoint=True)
    rows, expected = (
        [
            {k: v for k, v in row.items() if not k.startswith(("seconds/", "memory/")) and k != "total_flos"}
            for row in read_metrics(path / "metrics.jsonl")
        ]
        for path in (tmp_path, folder)
    )
    assert rows == expected
    assert sum(row["oversampled_questions"] for row in expected[1:]) > 0
