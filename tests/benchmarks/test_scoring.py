import pytest

from vitos.benchmarks.scoring import Score, Verdict, aggregate, score_choice


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
