from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.record import AnswerKind, Record, option_lines
from vitos.core.response import parse_reasoning
from vitos.eval.scoring import (
    Score,
    Verdict,
    aggregate,
    choose_option,
    in_protocol,
    normalize_answer,
    score_answer,
    score_choice,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("B", "B", Verdict.CORRECT),
        (" b\n", "B", Verdict.CORRECT),
        ("A", "B", Verdict.WRONG),
        ("Z", "B", Verdict.WRONG),
        ("B) cyst", "B", Verdict.WRONG),
        ("AB", "B", Verdict.WRONG),
        (None, "B", Verdict.NO_ANSWER),
        ("", "B", Verdict.NO_ANSWER),
        (" \n", "B", Verdict.NO_ANSWER),
    ],
)
def test_score_choice(answer: str | None, gold: str, verdict: Verdict) -> None:
    assert score_choice(answer, gold) is verdict


def test_a_blank_gold_answer_is_an_error_even_without_an_answer() -> None:
    with pytest.raises(ValueError, match="gold answer is blank"):
        score_choice(None, " ")


def test_aggregate_counts_a_missing_answer_as_not_correct() -> None:
    verdicts = [Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.NO_ANSWER, Verdict.CORRECT]
    assert aggregate(iter(verdicts)) == Score(count=5, accuracy=0.4, no_answer_rate=0.4)


def test_aggregate_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no verdicts"):
        aggregate([])


def test_verdicts_are_plain_strings_in_json() -> None:
    assert [str(v) for v in Verdict] == ["correct", "wrong", "no_answer"]


# --- answers of benchmarks ------------------------------------------------------------------------------------------


def record(answer: str, kind: AnswerKind = "letter", options: tuple[str, ...] = ("cyst", "a nodule")) -> Record:
    question = "<image>What?" + (option_lines(options) if kind == "letter" else "")
    return Record("r", (Path("a.png"),), question, answer, kind=kind)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>x</think><answer>B</answer>", "B"),
        ("<think>x</think><answer>B) a nodule</answer>", "B"),
        ("<answer>Nodule.</answer>", "B"),
        ("the CYST", "A"),
        ("<answer>cyst</answer><answer>cyst</answer>", "A"),
        ("<answer>cyst</answer><answer>nodule</answer>", None),
        ("<answer>cyst or nodule</answer>", None),
        ("<answer>small cyst</answer>", None),
        ("<answer>C</answer>", None),
        ("I see a cyst", None),
        ("<think>cyst", None),
        ("<answer></answer>", None),
        ("", None),
    ],
)
def test_a_choice_is_a_letter_or_the_exact_text_of_one_option(text: str, answer: str | None) -> None:
    assert choose_option(text, {"A": "cyst", "B": "a nodule"}) == answer
    scored = score_answer(text, record("B"))
    assert scored.answer == answer
    assert scored.token_f1 is None
    assert scored.verdict == {"B": Verdict.CORRECT, "A": Verdict.WRONG, None: Verdict.NO_ANSWER}[answer]


def test_a_text_that_two_options_share_chooses_none() -> None:
    assert choose_option("cyst", {"A": "cyst", "B": "Cyst."}) is None
    assert choose_option("B", {"A": "cyst", "B": "Cyst."}) == "B"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Left-Lung.", "left lung"),
        ("ＣＴ", "ct"),
        ("1,000.5 mg", "1,000.5 mg"),
        ("a", "a"),
        ("+", "+"),
        ("左肺。", "左肺"),
        ("yes, it is", "yes it is"),
        ("x_ray", "x ray"),
    ],
)
def test_normalisation(text: str, same: str) -> None:
    assert normalize_answer(text) == same


@given(st.text())
def test_normalisation_is_total_and_stable(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert bool(once) == bool(text.split())


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("HER2+", "HER2-"),
        ("< 5 mm", "> 5 mm"),
        ("≥5", "≤5"),
        ("-5", "5"),
        ("10²", "102"),
        ("hepatitis A", "hepatitis"),
        (".5", "5"),
        ("stage II", "stage III"),
        ("A+", "A-"),
        ("T1-T4", "T1, T4"),
    ],
)
def test_opposite_answers_are_never_scored_right(answer: str, gold: str) -> None:
    for one, other in ((answer, gold), (gold, answer)):
        assert score_answer(f"<answer>{one}</answer>", record(other, "text")).verdict is Verdict.WRONG
        assert score_answer(one, record(other, "word")).verdict is Verdict.WRONG
        assert score_answer(one, record(one, "text")).verdict is Verdict.CORRECT
        options = record("A", options=(one, other))
        assert score_answer(one, options).verdict is Verdict.CORRECT
        assert score_answer(other, options).verdict is Verdict.WRONG


def test_an_instruction_behind_the_options_does_not_cost_the_last_one() -> None:
    question = "<image>What?\nA. cyst\nB. mass\nAnswer with the option's letter from the given choices directly."
    asked = Record("r", (Path("a.png"),), question, "B")
    for text in ("mass", "<answer>mass</answer>", "B. mass", "<answer>B. mass</answer>", "B", "The answer is B. mass"):
        assert score_answer(text, asked).verdict is Verdict.CORRECT
        assert (parse_reasoning(text, asked.options).answer == "B") == (text != "mass")


def test_marks_alone_and_numbers_are_not_confused() -> None:
    assert normalize_answer("+") != normalize_answer("-")
    assert normalize_answer("1.5") != normalize_answer("15")


def test_token_f1_by_hand() -> None:
    assert token_f1("left lower lobe", "the left lobe") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("left left", "left lung") == pytest.approx(0.5)
    assert token_f1("左上肺", "左肺") == pytest.approx(0.8)  # two of three characters, two of two
    assert token_f1("right", "left") == 0.0


@pytest.mark.parametrize(
    ("text", "gold", "verdict", "f1"),
    [
        ("<think>t</think><answer>Left lung.</answer>", "left lung", Verdict.CORRECT, 1.0),
        ("<think>t</think> left lung", "left lung", Verdict.CORRECT, 1.0),
        ("left", "left lung", Verdict.WRONG, 2 / 3),
        ("<think>left lung", "left lung", Verdict.NO_ANSWER, 0.0),
        ("<answer> </answer>", "left lung", Verdict.NO_ANSWER, 0.0),
        ("<answer>left lung", "left lung", Verdict.NO_ANSWER, 0.0),
    ],
)
def test_texts(text: str, gold: str, verdict: Verdict, f1: float) -> None:
    scored = score_answer(text, record(gold, "text"))
    assert scored.verdict is verdict
    assert scored.token_f1 == pytest.approx(f1)


def test_a_blank_gold_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="r: the gold answer is blank"):
        score_answer("x", record(" ", "text"))


def test_the_score_is_the_one_of_training() -> None:
    """Letters count whole; a text that shares half of its words is wrong, but worth something."""
    assert score_answer("<answer>B</answer>", record("B")).score == 1
    scored = score_answer("<answer>left</answer>", record("left lung", "text"))
    assert (scored.verdict, scored.score) == (Verdict.WRONG, pytest.approx(2 / 3))
    several = replace(record("left lung", "text"), accepted=("sinister lung",))
    assert score_answer("<answer>Sinister lung.</answer>", several).verdict is Verdict.CORRECT


def test_protocols() -> None:
    kinds: tuple[AnswerKind, ...] = ("letter", "word", "number", "list", "text")
    assert [in_protocol(record("x", kind), "choice") for kind in kinds] == [True, True, False, False, False]
    assert all(in_protocol(record("x", kind), "open") for kind in kinds)
