"""A small batch of two questions, G = K = 2, whose losses' inputs are worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitos.config.options import DualStreamOptions
from vitos.core.prompt import Prompt
from vitos.engines.base import Completion
from vitos.policy.types import Rollout
from vitos.rl.batch import localization_batch, reasoning_batch
from vitos.rl.rewards import GroupRewards
from vitos.rl.rollout import QuestionGroup, RolloutBatch

# Rewards, and the outcomes they came from. Question 0: the answers of O'_1j differ. Question 1: nothing differs but
# the format, which is no outcome.
LOCALIZATION = np.array([[[1.0, 1.0], [3.0, 5.0]], [[0.2, 0.2], [0.0, 0.0]]])
REASONING = np.array([[[0.0, 0.0], [2.0, 6.0]], [[1.0, 1.0], [1.2, 1.0]]])
SPARSE_ACCURACY = np.array([[[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
ACCURACY = np.array([[1.0, 1.0], [1.0, 1.0]])
# Σ_j of (r - 2.5) / (std + 0.5), std = sqrt((1.5² + 1.5² + 0.5² + 2.5²) / 4)
STD = np.sqrt(11 / 4)
OPTIONS = {"num_localizations": 2, "num_reasonings": 2, "advantage_std_floor": 0.5}


def rollout(tokens, name):
    ids = torch.arange(tokens) + 10
    return Rollout(Completion(ids, -0.1 * ids.float(), name, True), SimpleNamespace())


def prompt(length):
    return Prompt(
        input_ids=torch.arange(length),
        position_ids=torch.arange(length)[None],
        is_visual=torch.zeros(length, dtype=bool),
        embeddings=None,
        next_position=length,
    )


def make_batch(iou=((np.nan, np.nan), (np.nan, np.nan)), sparse_accuracy=SPARSE_ACCURACY):
    groups = []
    for p in range(2):
        terms = {"accuracy": ACCURACY[p], "iou": np.array(iou[p]), "sparse_accuracy": sparse_accuracy[p]}
        groups.append(
            QuestionGroup(
                record=None,
                query=None,
                localizations=[rollout(3 + i, f"O{p}{i}") for i in range(2)],
                kept=[],
                reasonings=[[rollout(1 + j, f"R{p}{i}{j}") for j in range(2)] for i in range(2)],
                rewards=GroupRewards(LOCALIZATION[p], REASONING[p], terms),
            )
        )
    return RolloutBatch(groups, [prompt(20), prompt(30)], [prompt(n) for n in (11, 12, 13, 14)])


def texts(branch):
    return [[c.text for c in siblings] for siblings in branch.completions]


def test_localization_sums_by_hand():
    branch = localization_batch(make_batch(), DualStreamOptions(**OPTIONS, skip_equal_outcomes=False))
    assert [len(p) for p in branch.prompts] == [20, 30]
    assert texts(branch) == [["O00", "O01"], ["O10", "O11"]]
    assert (branch.repeats, branch.skipped) == (2, 0)
    np.testing.assert_allclose(branch.positive[0], [0, 3.0 / (STD + 0.5)])  # 0.5 + 2.5
    np.testing.assert_allclose(branch.negative[0], [-3.0 / (STD + 0.5), 0])  # -1.5 - 1.5
    np.testing.assert_allclose(branch.positive[1], [0.2 / 0.6, 0])  # std 0.1
    np.testing.assert_allclose(branch.negative[1], [0, -0.2 / 0.6])
    assert branch.tokens == 2 * (3 + 4 + 3 + 4)


def test_a_localization_may_have_advantages_of_both_signs():
    batch = make_batch()
    batch.groups[0].rewards.localization[:] = [[0.0, 4.0], [2.0, 2.0]]
    try:
        options = DualStreamOptions(**OPTIONS, skip_equal_outcomes=False, scale_advantages=False)
        branch = localization_batch(batch, options)
    finally:
        LOCALIZATION[0] = [[1.0, 1.0], [3.0, 5.0]]
    np.testing.assert_array_equal(branch.positive[0], [2, 0])
    np.testing.assert_array_equal(branch.negative[0], [-2, 0])


def test_questions_without_a_difference_in_outcome_are_left_out_and_counted():
    options = DualStreamOptions(**OPTIONS)
    branch = localization_batch(make_batch(), options)
    assert (texts(branch), branch.skipped) == ([["O00", "O01"]], 1)
    assert branch.tokens == 2 * 7
    # Better boxes are an outcome, also where all answers are right.
    assert localization_batch(make_batch(iou=((0.5, 0.5), (0.1, 0.2))), options).skipped == 0
    nothing = localization_batch(make_batch(sparse_accuracy=np.ones((2, 2, 2))), options)
    assert (nothing.prompts, nothing.skipped, nothing.tokens, nothing.mean_tokens) == ([], 2, 0, 0)


def test_reasoning_pair_group_by_hand():
    branch = reasoning_batch(make_batch(), DualStreamOptions(**OPTIONS, skip_equal_outcomes=False))
    assert [len(p) for p in branch.prompts] == [11, 12, 13, 14]
    assert texts(branch)[:2] == [["R000", "R001"], ["R010", "R011"]]
    std = np.sqrt((4 + 4 + 0 + 16) / 4)
    np.testing.assert_allclose(branch.positive[1], [0, 4 / (std + 0.5)])
    np.testing.assert_allclose(branch.negative[0], [-2 / (std + 0.5)] * 2)
    np.testing.assert_allclose(branch.negative[1], 0)
    assert (branch.repeats, branch.tokens, branch.skipped) == (1, 4 * (1 + 2), 0)
    kept = reasoning_batch(make_batch(), DualStreamOptions(**OPTIONS))
    assert (texts(kept), kept.skipped) == ([["R000", "R001"], ["R010", "R011"]], 1)


def test_reasoning_evidence_group_by_hand():
    options = DualStreamOptions(**OPTIONS, advantage_group="evidence")
    branch = reasoning_batch(make_batch(), options)
    # Only O'_01 has answers that differ; the three other groups of K are left out.
    assert (texts(branch), branch.skipped) == ([["R010", "R011"]], 3)
    assert [len(p) for p in branch.prompts] == [12]
    np.testing.assert_allclose(branch.positive[0], [0, 2 / 2.5])
    np.testing.assert_allclose(branch.negative[0], [-2 / 2.5, 0])


def test_localization_baseline_is_the_question_s_even_with_evidence_groups():
    pair, evidence = (
        localization_batch(make_batch(), DualStreamOptions(**OPTIONS, advantage_group=group))
        for group in ("pair", "evidence")
    )
    np.testing.assert_array_equal(pair.positive[0], evidence.positive[0])


@pytest.mark.parametrize("index", [[1], [1, 0]])
def test_parts_and_their_tensors(index):
    branch = localization_batch(make_batch(), DualStreamOptions(**OPTIONS, skip_equal_outcomes=False))
    part = branch.part(index)
    assert texts(part) == [texts(branch)[i] for i in index]
    assert (part.repeats, part.skipped) == (branch.repeats, branch.skipped)
    old, positive, negative = part.tensors(torch.ones(2 * len(index), 4, dtype=torch.float32))
    row = [-1.0, -1.1, -1.2]
    torch.testing.assert_close(old[:2], torch.tensor([[*row, 0], [*row, -1.3]]))
    expected = np.concatenate([branch.positive[i] for i in index])
    np.testing.assert_allclose(positive.numpy(), expected, rtol=1e-6)
    assert positive.dtype == negative.dtype == torch.float32
    np.testing.assert_allclose(negative.numpy(), np.concatenate([branch.negative[i] for i in index]), rtol=1e-6)


def test_a_guard_acts_on_all_completions_and_the_others_learn_nothing():
    options = DualStreamOptions(**OPTIONS)
    for make, count in ((localization_batch, 2), (reasoning_batch, 4)):
        kept, everything = make(make_batch(), options), make(make_batch(), options, everything=True)
        assert len(everything.prompts) == count > len(kept.prompts)
        assert everything.skipped == kept.skipped == 1
        assert everything.mean_tokens == kept.mean_tokens == kept.tokens < everything.tokens
        told = {
            p.input_ids.shape[0]: (a, b) for p, a, b in zip(kept.prompts, kept.positive, kept.negative, strict=True)
        }
        for prompt_, a, b in zip(everything.prompts, everything.positive, everything.negative, strict=True):
            expected = told.get(len(prompt_), (np.zeros_like(a), np.zeros_like(b)))
            np.testing.assert_array_equal((a, b), expected)


def test_the_token_mean_runs_over_kept_or_all_groups():
    kept = localization_batch(make_batch(), DualStreamOptions(**OPTIONS))
    every = localization_batch(make_batch(), DualStreamOptions(**OPTIONS, token_mean="all"))
    assert texts(kept) == texts(every)
    assert kept.mean_tokens == 2 * (3 + 4)  # K = 2 times both completions of the one question that counts
    assert every.mean_tokens == 2 * kept.mean_tokens


def test_truncated_completions_are_masked_if_asked_for():
    batch = make_batch()
    first = batch.groups[0].localizations[0]
    batch.groups[0].localizations[0] = replace(first, completion=replace(first.completion, finished=False))
    plain = localization_batch(batch, DualStreamOptions(**OPTIONS))
    masked = localization_batch(batch, DualStreamOptions(**OPTIONS, mask_truncated=True))
    assert texts(plain) == texts(masked)
    assert plain.positive[0][0] - plain.negative[0][0] > 0
    assert (masked.positive[0][0], masked.negative[0][0]) == (0, 0)
    assert (masked.positive[0][1], masked.negative[0][1]) == (plain.positive[0][1], plain.negative[0][1])
    assert masked.mean_tokens == plain.mean_tokens - 2 * 3


def test_a_user_s_reward_is_an_outcome_of_its_branch():
    batch = make_batch()
    quiet = batch.groups[1]
    assert localization_batch(batch, DualStreamOptions(**OPTIONS)).skipped == 1
    mine = quiet.rewards.terms | {"mine": np.array([0.0, 1.0]), "sparse_mine": np.zeros((2, 2))}
    other = batch.groups[0].rewards.terms | {"mine": np.zeros(2), "sparse_mine": np.zeros((2, 2))}
    batch.groups[1] = replace(quiet, rewards=replace(quiet.rewards, terms=mine))
    batch.groups[0] = replace(batch.groups[0], rewards=replace(batch.groups[0].rewards, terms=other))
    assert localization_batch(batch, DualStreamOptions(**OPTIONS)).skipped == 0
    assert reasoning_batch(batch, DualStreamOptions(**OPTIONS)).skipped == 1
