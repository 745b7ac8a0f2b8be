from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.answers import FORMS, answer_problem, is_right, list_f1, list_findings, score_answer_text, token_f1
from vitos.core.record import AnswerKind, Record


def record(answer, kind, *accepted, tolerance=""):
    return Record("r", (), "<image>What?", answer, kind=kind, accepted=accepted, tolerance=tolerance)


def test_every_kind_has_a_form():
    assert set(FORMS) == set(get_args(AnswerKind))
    assert len({form.request for form in FORMS.values()}) == len(FORMS)


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "score"),
    [
        ("letter", "B", "B", 1),
        ("letter", "B", "A", 0),
        ("word", "left lung", "The left lung.", 1),
        ("word", "left lung", "right lung", 0),
        ("number", "12 mm", "1.2 cm", 1),
        ("number", "12 mm", "12", 0),
        ("number", "2", "two nodules", 1),
        ("list", "effusion; cardiomegaly", "Cardiomegaly, effusion", 1),
        ("list", "effusion; cardiomegaly", "- effusion\n- mass", 0.5),
        ("list", "effusion; cardiomegaly", "effusion", 2 / 3),
        ("list", "effusion; cardiomegaly", "no effusion and no cardiomegaly", 0),
        ("list", "effusion", "effusion, effusion, effusion", 1),
        ("list", "nausea and vomiting; fever", "fever, nausea and vomiting", 1),
        ("text", "left lower lobe", "the left lower lobe", 1),
        ("text", "left lower lobe", "left upper lobe", 2 / 3),
        ("text", "left lower lobe", "spleen", 0),
    ],
)
def test_scores(kind, gold, answer, score):
    asked = record(gold, kind)
    assert not answer_problem(kind, gold)
    assert score_answer_text(answer, asked) == pytest.approx(score)
    assert is_right(answer, asked) == (score == 1)


@pytest.mark.parametrize("kind", FORMS)
def test_no_answer_is_worth_nothing(kind):
    asked = record("2" if kind == "number" else "B", kind)
    assert score_answer_text(None, asked) == 0
    assert not is_right(None, asked)


def test_the_best_of_the_accepted_answers_counts():
    asked = record("myocardial infarction", "text", "heart attack", "MI")
    assert [score_answer_text(text, asked) for text in ("mi", "a heart attack", "attack")] == [
        1,
        1,
        pytest.approx(2 / 3),
    ]
    assert is_right("Heart attack.", asked)
    assert not is_right("attack", asked)


def test_words_in_another_order_are_not_the_same_text():
    """Token F1 knows no order; right and wrong do."""
    asked = record("upper left", "text")
    assert score_answer_text("left upper", asked) == 1
    assert not is_right("left upper", asked)


ITEMS = st.lists(st.sampled_from(["effusion", "cardiomegaly", "mass", "rib fracture", "no nodule"]), max_size=5)


@given(ITEMS.filter(bool), ITEMS, st.sampled_from([", ", "; ", "\n", " and "]))
def test_list_f1_is_that_of_sets(gold, answer, mark):
    wanted, given_ = set(gold), set(answer)
    precision = len(wanted & given_) / len(given_) if given_ else 0
    recall = len(wanted & given_) / len(wanted)
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert list_f1(mark.join(answer), "; ".join(gold)) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abcd"), max_size=6), st.lists(st.sampled_from("abcd"), min_size=1, max_size=6))
def test_token_f1_is_that_of_multisets(answer, gold):
    # Two letters each: a single "a" would be an article.
    given_, wanted = Counter(x * 2 for x in answer), Counter(x * 2 for x in gold)
    shared = sum((given_ & wanted).values())
    expected = 2 * shared / (len(answer) + len(gold))
    assert token_f1(" ".join(given_.elements()), " ".join(wanted.elements())) == pytest.approx(expected)


@given(st.text(), st.sampled_from(sorted(FORMS)))
def test_every_text_has_a_score(text, kind):
    asked = record({"number": "12 mm", "letter": "B"}.get(kind, "left lung"), kind)
    assert 0 <= score_answer_text(text, asked) <= 1


def test_findings_keep_commas_inside_numbers():
    assert list_findings("mass of 1,5 cm, effusion") == {"mass of 1,5 cm", "effusion"}
