"""Options and answers as releases word them, and what becomes of them in a record."""

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitos.core.record import option_lines, parse_options
from vitos.eval.datasets.questions import place_images, with_options, yes_no_or
from vitos.eval.datasets.rows import RowError


@pytest.mark.parametrize(
    ("options", "right", "text", "letter"),
    [
        (["cyst", "nodule"], {"answer": "nodule"}, "Q?\nA. cyst\nB. nodule", "B"),
        (["cyst", "nodule"], {"letter": " B "}, "Q?\nA. cyst\nB. nodule", "B"),
        ([" A:cyst ", " B:nodule "], {"letter": "B"}, "Q?\nA. cyst\nB. nodule", "B"),
        (["(A) cyst", "B. nodule"], {"answer": "cyst"}, "Q?\nA. cyst\nB. nodule", "A"),
        (["B: x", "A: y"], {"letter": "A"}, "Q?\nA. B: x\nB. A: y", "A"),  # not their own letters
        (["A", "B", "AB"], {"answer": "B"}, "Q?\nA. A\nB. B\nC. AB", "B"),
        (["B", "A", "AB"], {"answer": "A"}, "Q?\nA. B\nB. A\nC. AB", "B"),
        (["B", "A", "AB"], {"letter": "A"}, "Q?\nA. B\nB. A\nC. AB", "A"),
        (["x", None, "z", ""], {"letter": "C"}, "Q?\nA. x\nB. z", "B"),
        (["x", "C. diff", "C. tetani"], {"letter": "C"}, "Q?\nA. x\nB. C. diff\nC. C. tetani", "C"),
        (["The Cyst.", "nodule"], {"answer": "cyst"}, "Q?\nA. The Cyst.\nB. nodule", "A"),
        (["x", "x"], {"letter": "B"}, "Q?\nA. x\nB. x", "B"),
        (["two\nlines", "one"], {"letter": "A"}, "Q?\nA. two lines\nB. one", "A"),
        (["维生素B. 复合", "没有"], {"answer": "没有"}, "Q?\nA. 维生素B. 复合\nB. 没有", "B"),
        (["HER2+", "HER2-"], {"answer": "her2 −"}, "Q?\nA. HER2+\nB. HER2-", "B"),
        (["two\u2028lines\rmore", "one"], {"letter": "A"}, "Q?\nA. two lines more\nB. one", "A"),
    ],
)
def test_options(options, right, text, letter):
    assert with_options("Q?", options, **right) == (text, letter)


@pytest.mark.parametrize(
    ("text", "options", "right", "reason"),
    [
        ("Q?", [], {"letter": "A"}, "has 0 options"),
        ("Q?", ["x", " ", None], {"letter": "A"}, "has 1 options"),
        ("Q?", ["A:", "B: x"], {"letter": "B"}, "has 1 options"),
        ("Q?", ["x", "y"], {"letter": "C"}, "the letter of no option"),
        ("Q?", ["x", None, "z"], {"letter": "B"}, "the letter of no option"),
        ("Q?", ["x", "y"], {"letter": "a"}, "the letter of no option"),
        ("Q?", ["x", "y"], {"answer": "z"}, "not among the options"),
        ("Q?", ["x", "x"], {"answer": "x"}, "the text of 2 options"),
        ("A. first\nB. second\nWhich?", ["x", "y"], {"letter": "A"}, "cannot be told from"),
        ("Q?", ["< 5 mm", "> 5 mm"], {"answer": "5 mm"}, "not among the options"),
        ("Q?", ["x", "y. Answer with the letter."], {"letter": "A"}, "cannot be told from"),
    ],
)
def test_options_that_are_none(text, options, right, reason):
    with pytest.raises(RowError, match=reason):
        with_options(text, options, **right)


WORDS = st.text(st.sampled_from(string.ascii_letters + string.digits + " .:()\u4e00"), min_size=1, max_size=20)


@given(WORDS, st.lists(WORDS, min_size=2, max_size=6), st.data())
def test_the_right_option_stays_right(text, options, data):
    """Whatever the texts: the letter that comes out names the option that went in, or the row is refused."""
    index = data.draw(st.integers(0, len(options) - 1))
    try:
        question, letter = with_options(text, options, letter=string.ascii_uppercase[index])
    except RowError:
        assume(False)
    right = parse_options(question)[letter]
    assert right in (options[index].strip(), options[index].strip().lstrip("(")[1:].lstrip(" ").lstrip(").:").strip())


@given(st.lists(WORDS.map(str.strip).filter(bool), min_size=2, max_size=26))
def test_option_lines_are_read_back(options):
    assume(not any(line[:1] in string.ascii_uppercase and line[1:2] in ").:" for line in options))
    assert list(parse_options("Which of these?" + option_lines(options)).values()) == options


def test_more_options_than_letters():
    with pytest.raises(ValueError, match="27 options"):
        option_lines(["x"] * 27)


@pytest.mark.parametrize("answer", ["yes", "Yes", " YES. "])
def test_yes_and_no_are_options(answer):
    assert yes_no_or("text", " Is it? ", answer) == ("Is it?\nA. yes\nB. no", "A", "letter")


@pytest.mark.parametrize("answer", ["yes, both", "not seen", "是"])
def test_other_answers_are_not(answer):
    assert yes_no_or("word", "Is it?", answer) == ("Is it?", answer, "word")


def test_images_stand_where_the_text_calls_them():
    assert place_images("Q?", 2) == "<image><image>Q?"
    assert place_images("<image> or <image>?", 2) == "<image> or <image>?"
    assert place_images("Is <image> it?", 2) == "<image>Is <image> it?"
    with pytest.raises(RowError, match="calls 2 images, but has 1"):
        place_images("<image><image>", 1)
