"""Rewards: a hand-computed group, brute-force matching, what must not pay, and user functions that misbehave."""

import asyncio
import math
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import Box, matched_iou
from vitos.core.record import Record
from vitos.core.response import Response, parse_localization, parse_reasoning
from vitos.rl.extra import AnsweredQuestion, Branch, ExtraReward, Per, RewardError, RewardFunction
from vitos.rl.rewards import (
    RewardWeights,
    accuracy,
    format_reward,
    group_rewards,
    iou_reward,
    reward_questions,
)
from vitos.rl.user_rewards import load_reward

GOLD = (Box(0.0, 0.0, 0.5, 0.5),)
WEIGHTS = RewardWeights(format=0.2, iou=1.0, accuracy=1.0, feedback=0.5)


def record(boxes: tuple[Box, ...] | None = GOLD) -> Record:
    return Record(id="slake-7", image_paths=(), question="<image> What? A) cyst B) mass", answer="B", boxes=boxes)


def located(evidence: str, answer: str) -> Response:
    return parse_localization(f"<think>t</think><evidence>{evidence}</evidence><answer>{answer}</answer>", "AB")


def reasoned(answer: str) -> Response:
    return parse_reasoning(f"<think>t</think><answer>{answer}</answer>", "AB")


# G = 2: a right answer on a box of IoU 1/2, and a wrong one on a box that is inverted. K = 3.
LOCALIZATIONS = [located("[[0.0, 0.0, 0.5, 1.0]]", "B"), located("[[0.5, 0.0, 0.0, 1.0]]", "A")]
REASONINGS = [
    [reasoned("B"), reasoned("A"), parse_reasoning("no idea", "AB")],
    [reasoned("B"), parse_reasoning("B", "AB"), reasoned("A")],
]


def test_a_group_computed_by_hand() -> None:
    rewards = group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS)
    # i = 1: 0.2·1 + 1·0.5 + 1·1 = 1.7, i = 2: 0; plus 0.5 for every right partner O'_ij
    np.testing.assert_allclose(rewards.localization, [[2.2, 1.7, 1.7], [0.5, 0.5, 0.0]])
    # 0.2·format + accuracy; plus 0.5 in the first row, whose O_i is right
    np.testing.assert_allclose(rewards.reasoning, [[1.7, 0.7, 0.5], [1.2, 1.0, 0.2]])
    expected = {
        "format": [1, 0],
        "iou": [0.5, 0],
        "accuracy": [1, 0],
        "sparse_format": [[1, 1, 0], [1, 0, 1]],
        "sparse_accuracy": [[1, 0, 0], [1, 1, 0]],
    }
    assert rewards.terms.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(rewards.terms[name], values)
        assert rewards.terms[name].dtype == np.float64


@pytest.mark.parametrize(
    ("weights", "localization", "reasoning"),
    [
        (RewardWeights(format=1, iou=0, accuracy=0, feedback=0), [[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 0, 1]]),
        (RewardWeights(format=0, iou=1, accuracy=0, feedback=0), [[0.5, 0.5, 0.5], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]),
        (RewardWeights(format=0, iou=0, accuracy=1, feedback=0), [[1, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]),
        (
            RewardWeights(format=0, iou=0, accuracy=0, feedback=1),
            [[1, 0, 0], [1, 1, 0]],
            [[1, 1, 1], [0, 0, 0]],
        ),  # feedback crosses over
    ],
    ids=["format", "iou", "accuracy", "feedback"],
)
def test_every_weight_has_its_own_term(
    weights: RewardWeights, localization: list[list[float]], reasoning: list[list[float]]
) -> None:
    rewards = group_rewards(record(), LOCALIZATIONS, REASONINGS, weights)
    np.testing.assert_array_equal(rewards.localization, localization)
    np.testing.assert_array_equal(rewards.reasoning, reasoning)


@pytest.mark.parametrize("boxes", [None, ()])
def test_iou_abstains_without_gold_boxes(boxes: tuple[Box, ...] | None) -> None:
    assert iou_reward(LOCALIZATIONS[0], record(boxes)) is None
    rewards = group_rewards(record(boxes), LOCALIZATIONS, REASONINGS, WEIGHTS)
    np.testing.assert_allclose(rewards.localization, [[1.7, 1.2, 1.2], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(rewards.reasoning, [[1.7, 0.7, 0.5], [1.2, 1.0, 0.2]])
    assert np.isnan(rewards.terms["iou"]).all()


def test_single_rewards() -> None:
    right, unread = LOCALIZATIONS
    assert (accuracy(right, record()), accuracy(unread, record())) == (1.0, 0.0)
    assert accuracy(parse_reasoning("no idea"), record()) == 0.0
    assert (format_reward(right), format_reward(unread)) == (1.0, 0.0)
    assert iou_reward(right, record()) == pytest.approx(0.5)
    assert iou_reward(unread, record()) == 0.0  # not None: an unreadable box list is the policy's fault


# Gold: one box of a quarter of the image. What a policy may try instead of looking.
@pytest.mark.parametrize(
    ("evidence", "reward"),
    [
        ("[[0, 0, 0.5, 0.5]]", 1.0),
        ("[[0, 0, 1, 1]]", 0.25),  # whole image
        ("[" + ", ".join(["[0, 0, 0.5, 0.5]"] * 10) + "]", 0.1),  # the right box ten times
        ("[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]", 0.5),  # one right, one at random
        ("[" + ", ".join(["[0, 0, 0.5, 0.5]"] * 1000) + "]", 0.0),  # beyond max_boxes
        ("[[0.5, 0.5, 1, 1]]", 0.0),  # touches at a corner
        ("[[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]", 0.0),  # one bad box spoils all
    ],
)
def test_box_spam_does_not_pay(evidence: str, reward: float) -> None:
    assert iou_reward(located(evidence, "B"), record()) == pytest.approx(reward)


_EDGES = st.lists(st.integers(min_value=0, max_value=6), min_size=2, max_size=2, unique=True).map(sorted)
_CELLS = st.tuples(_EDGES, _EDGES).map(lambda axes: (axes[0][0], axes[1][0], axes[0][1], axes[1][1]))
_SETS = st.lists(_CELLS, min_size=1, max_size=4)
Cells = tuple[int, int, int, int]


def iou_by_counting(a: Cells, b: Cells) -> Fraction:
    cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
    return Fraction(len(cells[0] & cells[1]), len(cells[0] | cells[1]))


def best_assignment(a: list[Cells], b: list[Cells]) -> Fraction:
    few, many = sorted((a, b), key=len)
    sums = (
        sum(iou_by_counting(f, m) for f, m in zip(few, order, strict=True)) for order in permutations(many, len(few))
    )
    return Fraction(max(sums)) / len(many)


@given(_SETS, _SETS)
def test_iou_is_the_best_of_all_assignments(predicted: list[Cells], gold: list[Cells]) -> None:
    boxes, gold_boxes = (tuple(Box(*(v / 6 for v in cells)) for cells in group) for group in (predicted, gold))
    response = Response(text="", thought=None, boxes=boxes, answer=None, well_formed=False)
    expected = float(best_assignment(predicted, gold))
    assert iou_reward(response, record(gold_boxes)) == pytest.approx(expected)
    assert matched_iou(gold_boxes, boxes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("localizations", "reasonings"),
    [([], []), (LOCALIZATIONS, REASONINGS[:1]), (LOCALIZATIONS, [[], []]), (LOCALIZATIONS, [REASONINGS[0], []])],
)
def test_wrong_shapes_are_errors(localizations: list[Response], reasonings: list[list[Response]]) -> None:
    with pytest.raises(ValueError, match="slake-7"):
        group_rewards(record(), localizations, reasonings, WEIGHTS)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["format", "iou", "accuracy", "feedback"])
def test_weights_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        RewardWeights(**{name: value})


def length(response: Response, record: Record) -> float | None:
    """Abstains on answers that are wrong."""
    return float(len(response.text)) if response.answer == record.answer else None


@pytest.mark.parametrize(
    ("branch", "names"),
    [("localization", {"length"}), ("reasoning", {"sparse_length"}), ("both", {"length", "sparse_length"})],
)
def test_extra_rewards_go_to_their_branch(branch: Branch, names: set[str]) -> None:
    plain = group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS)
    extra = ExtraReward("length", length, weight=-0.01, branch=branch)
    rewards = group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, [extra])
    assert rewards.terms.keys() - plain.terms.keys() == names
    dense = np.array([len(LOCALIZATIONS[0].text), np.nan])
    sparse = np.array([[len(reasoned("B").text), np.nan, np.nan], [len(reasoned("B").text), 1, np.nan]])
    localization, reasoning = plain.localization, plain.reasoning
    if "length" in names:
        np.testing.assert_array_equal(rewards.terms["length"], dense)
        localization = localization - 0.01 * np.array([[dense[0]] * 3, [0] * 3])
    if "sparse_length" in names:
        np.testing.assert_array_equal(rewards.terms["sparse_length"], sparse)
        reasoning = reasoning - 0.01 * np.where(np.isnan(sparse), 0, sparse)
    np.testing.assert_allclose(rewards.localization, localization)
    np.testing.assert_allclose(rewards.reasoning, reasoning)


@pytest.mark.parametrize("names", [["iou"], ["mine", "mine"]])
def test_a_name_is_used_once(names: list[str]) -> None:
    extra = [ExtraReward(name, length, weight=1.0, branch="localization") for name in names]
    with pytest.raises(ValueError, match=names[0]):
        group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, extra)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 10**5000, "1", [1.0], 1j, np.array([1.0, 2.0])], ids=lambda v: type(v).__name__
)
def test_results_that_are_no_finite_number_are_errors(value: Any) -> None:
    extra = ExtraReward("mine", lambda response, record: cast(float, value), weight=1.0, branch="reasoning")
    with pytest.raises(RewardError, match="'mine', record 'slake-7': expected a finite number or None"):
        group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, [extra])


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1)])
def test_any_finite_number_is_a_reward(value: Any) -> None:
    extra = ExtraReward("mine", lambda response, record: cast(float, value), weight=1.0, branch="both")
    assert (group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, [extra]).terms["mine"] == 1.0).all()


def test_an_exception_is_an_error_with_a_name_and_a_cause() -> None:
    def broken(response: Response, record: Record) -> float:
        return 1 / 0

    with pytest.raises(RewardError, match="'mine', record 'slake-7': ZeroDivisionError") as caught:
        group_rewards(
            record(),
            LOCALIZATIONS,
            REASONINGS,
            WEIGHTS,
            [ExtraReward("mine", broken, weight=1.0, branch="localization")],
        )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_extra_weight_is_finite() -> None:
    with pytest.raises(ValueError, match="mine"):
        ExtraReward("mine", length, weight=math.nan, branch="both")


REWARD_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Limit:
    characters: int

def short(response, record):
    return float(len(response.text) < Limit(100).characters)

def alone(response):
    return 1.0

constant = 3
"""


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARD_FILE)
    return path


def test_a_reward_is_loaded_from_a_file(reward_file: Path) -> None:
    function: RewardFunction = load_reward(f"{reward_file}:short")
    rewards = group_rewards(
        record(),
        LOCALIZATIONS,
        REASONINGS,
        RewardWeights(format=0, iou=0, accuracy=0, feedback=0),
        [ExtraReward("s", function, weight=2, branch="both")],
    )
    np.testing.assert_array_equal(rewards.localization, np.full((2, 3), 2.0))
    assert function(parse_reasoning("x" * 100), record()) == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no function 'missing'"),
        ("constant", "no function"),
        ("alone", "must take"),
        ("a b", "expected path"),
    ],
)
def test_functions_that_cannot_be_rewards(reward_file: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(f"{reward_file}:{name}")


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="expected path"):
        load_reward("os.path:join")
    with pytest.raises(RewardError, match="no file"):
        load_reward(f"{tmp_path}/absent.py:f")
    (tmp_path / "broken.py").write_text("import a_module_that_does_not_exist")
    with pytest.raises(RewardError, match=r"importing the file failed: ModuleNotFoundError"):
        load_reward(f"{tmp_path}/broken.py:f")


# --- async, groups --------------------------------------------------------------------------------------------------


async def slow_length(response: Response, record: Record) -> float | None:
    await asyncio.sleep(0.1)
    return length(response, record)


def group_length(responses: list[Response], record: Record) -> list[float | None]:
    return [length(response, record) for response in responses]


async def slow_group_length(responses: list[Response], record: Record) -> list[float | None]:
    await asyncio.sleep(0.1)
    return group_length(responses, record)


async def read_together(response: Response, record: Record) -> float | None:
    """Waits until all of its siblings wait, too."""
    await MEETING.wait()
    return length(response, record)


MEETING: asyncio.Barrier


@pytest.mark.parametrize(
    ("function", "per"), [(slow_length, "response"), (group_length, "group"), (slow_group_length, "group")]
)
def test_the_four_forms_of_a_reward_are_worth_the_same(function: RewardFunction, per: Per) -> None:
    expected, found = (
        group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, [reward])
        for reward in (
            ExtraReward("mine", length, weight=-0.01, branch="both"),
            ExtraReward("mine", function, weight=-0.01, branch="both", per=per),
        )
    )
    np.testing.assert_array_equal(found.localization, expected.localization)
    np.testing.assert_array_equal(found.reasoning, expected.reasoning)
    for term, values in expected.terms.items():
        np.testing.assert_array_equal(found.terms[term], values)


def test_async_rewards_of_all_questions_run_together() -> None:
    """Each of the 3 · (2 + 6) calls ends only when all have begun."""
    global MEETING
    MEETING = asyncio.Barrier(24)
    reward = ExtraReward("mine", read_together, weight=1.0, branch="both")
    questions = [AnsweredQuestion(record(), LOCALIZATIONS, REASONINGS)] * 3
    assert len(reward_questions(questions, WEIGHTS, [reward])) == 3


@pytest.mark.parametrize("value", [[1.0], 1.0, None, "abcdef", [1.0] * 7])
def test_a_group_reward_gives_one_value_per_response(value: Any) -> None:
    extra = ExtraReward("mine", lambda responses, record: value, weight=1.0, branch="reasoning", per="group")
    with pytest.raises(RewardError, match="'mine', record 'slake-7': expected a list of 6 values"):
        group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, [extra])


def test_an_exception_in_an_async_reward_has_a_name() -> None:
    async def broken(response: Response, record: Record) -> float:
        await asyncio.sleep(0)
        return 1 / 0

    extra = [ExtraReward("mine", broken, weight=1.0, branch="localization")]
    with pytest.raises(RewardError, match="'mine', record 'slake-7': ZeroDivisionError"):
        group_rewards(record(), LOCALIZATIONS, REASONINGS, WEIGHTS, extra)
