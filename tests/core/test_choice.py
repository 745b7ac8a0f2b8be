"""Which option a text chooses: every spelling for every letter alike, and nothing that is hedged or taken back."""

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.choice import name_option
from vitos.core.options import option_lines
from vitos.core.record import parse_options
from vitos.core.response import parse_localization, parse_reasoning
from vitos.eval.scoring import choose_option


def tagged(content: str) -> str:
    return f"<think>so</think><answer>{content}</answer>"


def read(text: str, options) -> str | None:
    """What is read from a text, which must be the same with and without tags, and in both branches."""
    found = {
        parse_reasoning(text, options).answer,
        parse_reasoning(tagged(text), options).answer,
        parse_reasoning(f"<think>so</think>\n{text}", options).answer,
        parse_localization(tagged(text), options).answer,
    }
    assert len(found) == 1, found
    return found.pop()


LETTER_ALONE = [
    *(
        "{L}",
        "{L}.",
        "({L})",
        "({L}).",
        "{L})",
        "{L}:",
        "[{L}]",
        " {L}\n",
        "**{L}**",
        "**{L}.**",
        "*{L}*",
        "`{L}`",
        "'{L}'",
    ),
    *('"{L}"', "\\boxed{{{L}}}", "$\\boxed{{{L}}}$", "\\boxed{{\\text{{{L}}}}}", "\\[\\boxed{{{L}}}\\]", "${L}$"),
    *(
        "Answer: {L}",
        "answer: {L}.",
        "ANSWER:{L}",
        "Answer: ({L})",
        "**Answer:** {L}",
        "**Answer: {L}**",
        "Answer: **{L}**",
    ),
    *("Final answer: {L}", "### Answer\n{L}", "Answer: \\boxed{{{L}}}", "The answer is {L}", "The answer is {L}."),
    *("the answer is ({L}).", "The correct answer is {L}.", "The final answer is: {L}.", "The answer is **{L}**."),
    *("The answer is \\boxed{{{L}}}.", "The correct option is {L}.", "Option {L}", "The answer is option {L}."),
    *("The most likely answer is {L}.", "It is round.\nAnswer: {L}", "It is round. Therefore, the answer is ({L})."),
    *("It does not enhance, so the answer is {L}.", "Based on the image, the correct answer is {L}."),
    *("It is not fluid. $\\boxed{{{L}}}$", "答案是{L}", "答案：{L}"),
]
LETTER_AND_TEXT = [
    *(
        "{L}. {t}",
        "{L}) {t}",
        "({L}) {t}",
        "{L}: {t}",
        "{L}:{t}",
        "{L} - {t}",
        "{L}. {t}.",
        "{L}、{t}",
        "**{L}. {t}**",
    ),
    *("**{L}.** {t}", "**{L}**. {t}", "\\boxed{{{L}. {t}}}", "Answer: {L}. {t}", "The answer is {L}. {t}"),
    *("The answer is ({L}) {t}.", "The answer is: **{L}. {t}**", "**Answer:** {L}) {t}", "{l}) {t}"),
]
TEXTS = st.lists(
    st.sampled_from(
        [
            *(
                "cyst",
                "a nodule",
                "no",
                "yes",
                "hepatitis A",
                "type A: aorta",
                "mass, round",
                "C. difficile",
                "A. fumigatus",
            ),
            *(
                "none of the above",
                "A",
                "B",
                "E",
                "I",
                "AB",
                "O",
                "not seen",
                "cyst or mass",
                "< 5 mm",
                "> 5 mm",
                "HER2+",
            ),
            *("HER2-", "10²", "102", "Stanford type B", "I think so", "either", "the answer is unclear"),
        ]
    ),
    min_size=2,
    max_size=10,
    unique=True,
)


@given(TEXTS, st.data())
def test_every_letter_is_read_alike_in_every_spelling(texts: list[str], data: st.DataObject) -> None:
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    letter = data.draw(st.sampled_from(sorted(options)))
    spelling = data.draw(st.sampled_from(LETTER_ALONE + LETTER_AND_TEXT))
    text = spelling.format(L=letter, l=letter.lower(), t=options[letter])
    if " - " in spelling and len(options[letter]) == 1:
        return  # "A - B" may be both
    assert read(text, options) == choose_option(text, options) == choose_option(tagged(text), options) == letter, text


@pytest.mark.parametrize("spelling", LETTER_ALONE)
def test_letters_are_read_alike_where_the_texts_are_not_known(spelling: str) -> None:
    for options in (string.ascii_uppercase, None, {}):
        found = [read(spelling.format(L=letter), options) for letter in string.ascii_uppercase]
        assert found == [*string.ascii_uppercase]


@given(TEXTS, st.data())
def test_a_letter_with_the_text_of_another_option_chooses_none(texts: list[str], data: st.DataObject) -> None:
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    letter, other = data.draw(st.permutations(sorted(options)))[:2]
    text = data.draw(st.sampled_from(LETTER_AND_TEXT)).format(L=letter, l=letter.lower(), t=options[other])
    if options[other] == letter:
        return  # the letter again
    named = [key for key, option in options.items() if option == text]  # "C. difficile" is a text itself
    assert choose_option(text, options) == choose_option(tagged(text), options) == (named[0] if named else None), text


OPTIONS = {"A": "nodule", "B": "cyst", "C": "mass", "D": "hepatitis B"}
NO_ANSWER = [
    *(
        "I do not think the answer is B",
        "I don't think the answer is B.",
        "I don’t think that, overall, the answer is B",
    ),
    *(
        "B) cyst or C",
        "B) cyst or mass",
        "B) cyst, C) mass",
        "B) not cyst",
        "B. nodule",
        "B cyst",
        "A nodule or a cyst",
    ),
    *(
        "A and B",
        "A, B",
        "A/B",
        "A or B",
        "A) or B)",
        "A. or B.",
        "(A) or (B)",
        "A & B",
        "B - C",
        "B C",
        "A. B",
        "A) B)",
    ),
    *("not A", "not \\boxed{B}", "either", "either A or B", "neither", "Neither A nor B", "none", "all", "both"),
    *(
        "B, no wait, C",
        "B... no, C",
        "B\nActually C",
        "B. cyst\nActually, the answer is C",
        "B. Cyst; on second thought, C",
    ),
    *("B. cyst? No, C", "B. cyst. Or perhaps C.", "B?", "The answer is B?", "Is the answer B?", "B or not B"),
    *("probably B", "Probably B.", "maybe B", "I think B", "I think the answer is B", "I believe the answer is B."),
    *("The answer is probably B.", "The answer might be B", "The answer could be B", "The likely answer is B"),
    *(
        "The answer is B, I think",
        "The answer is B or C",
        "The answer is not B",
        "The answer isn't B",
        "The answer is not A but B",
    ),
    *("If it is round, the answer is B.", "Unless it is solid, the answer is B", "I am not sure, but the answer is B"),
    *("The answer is A. No, the answer is B.", "The answer is A. The answer is B.", "Answer: A\nAnswer: B"),
    *(
        "B. The answer is C",
        "B\nThe answer is C",
        "B. cyst\nThe answer is C",
        "\\boxed{A} \\boxed{B}",
        "\\boxed{A or B}",
    ),
    *(
        "Some would say the answer is B",
        "It is wrong that the answer is B",
        "Wrong answer: B",
        "B is wrong",
        "rule out B",
    ),
    *(
        "B. cyst?",
        "B) cyst?!",
        "The answer is b",
        "b",
        "the answer is a",
        "It is B",
        "Answer B",
        "Options: A, B",
        "The answer is Benign",
        "(B",
        "-B",
    ),
    *("E", "E.", "Answer: E", "The answer is E.", "", " ", ".", "Benign", "Bcyst", "BC"),
]


@pytest.mark.parametrize("text", NO_ANSWER)
def test_what_is_hedged_or_taken_back_or_doubtful_is_no_answer(text: str) -> None:
    assert read(text, OPTIONS) is None
    assert choose_option(text, OPTIONS) is None
    assert choose_option(tagged(text), OPTIONS) is None
    if text not in ("B. nodule",):  # where the texts are not known, this may be B's
        assert read(text, "ABCD") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A. nodule: no.\nB. cyst: yes.\nTherefore the answer is B.", "B"),
        ("A. nodule\nB. cyst\nC. mass\nD. hepatitis B\nAnswer: B", "B"),
        ("B. cyst\nThe answer is B", "B"),
        ("B\n\nAnswer: B", "B"),
        ("It may be A or C. It does not enhance. Answer: B", "B"),
        ("I think it is a cyst. The answer is B.", "B"),
    ],
)
def test_reasoning_in_front_of_an_answer_is_passed_over(text: str, letter: str) -> None:
    assert read(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [
        (["B", "A", "AB", "O"], "B. A", "B"),
        (["B", "A", "AB", "O"], "A. B", "A"),
        (["B", "A", "AB", "O"], "A", "A"),
        (["B", "A", "AB", "O"], "AB", "C"),
        (["B", "A", "AB", "O"], "O", "D"),
        (["B", "A", "AB", "O"], "B. B", "B"),  # the letter twice
        (["B", "A", "AB", "O"], "B. AB", None),
        (["B", "A", "AB", "O"], "A or B", None),
        (["E", "D", "C", "B", "A"], "E. A", "E"),
        (["E", "D", "C", "B", "A"], "The answer is E. A", "E"),
        (
            ["Stanford type B: descending", "Stanford type A: ascending aorta"],
            "B. Stanford type A: ascending aorta",
            "B",
        ),
        (
            ["Stanford type B: descending", "Stanford type A: ascending aorta"],
            "A. Stanford type A: ascending aorta",
            None,
        ),
        (["S. aureus", "E. coli", "C. difficile"], "C. difficile", "C"),
        (["S. aureus", "E. coli", "C. difficile"], "E. coli", "B"),
        (["S. aureus", "E. coli", "C. difficile"], "C. C. difficile", "C"),
        (["C. difficile", "E. coli", "difficile"], "C. difficile", None),  # A's text, or C's with its letter
        (["<5 mm", "> 5 mm"], "> 5 mm", "B"),
        (["<5 mm", "> 5 mm"], "< 5 mm", "A"),
        (["<5 mm", "> 5 mm"], "5 mm", None),
        (["<5 mm", "> 5 mm"], "A. > 5 mm", None),
        (["AA", "Aa", "aa"], "Aa", "B"),
    ],
)
def test_letters_and_signs_inside_options(options: list[str], text: str, letter: str | None) -> None:
    texts = dict(zip("ABCDE", options, strict=False))
    assert choose_option(text, texts) == letter
    assert choose_option(tagged(text), texts) == letter


@pytest.mark.parametrize(
    ("written", "letter"),
    [
        *(("cyst", "A"), ("The CYST.", "A"), ("a cyst", "A"), ("A cyst", "A"), ("a nodule", "B"), ("nodule", "B")),
        *(("The answer is a cyst.", "A"), ("Answer: nodule", "B"), ("**cyst**", "A"), ("\\boxed{cyst}", "A")),
        *(
            ("A nodule", None),
            ("A. nodule", None),
            ("B nodule", None),
            ("the answer is not cyst", None),
            ("cyst?!", None),
        ),
        *(("small cyst", None), ("cyst or nodule", None), ("", None)),
    ],
)
def test_an_option_named_by_its_text(written: str, letter: str | None) -> None:
    assert name_option(written, {"A": "cyst", "B": "nodule"}) == letter


def test_a_text_with_an_article_of_its_own_is_that_text() -> None:
    assert name_option("A nodule", {"A": "cyst", "B": "A nodule"}) == "B"


@given(
    st.lists(
        st.text("abcde AB.:()<>+-²", min_size=1, max_size=15).map(str.strip).filter(bool), min_size=2, max_size=10
    )
)
def test_what_the_package_itself_spells_is_read(texts: list[str]) -> None:
    """`L. text` as questions print it and `spell_answer` writes it, where no other reading is possible."""
    options = parse_options("Q?" + option_lines(texts))
    for letter, text in options.items():
        same = [other for other, option in options.items() if option.split() == f"{letter}. {text}".split()]
        found = parse_reasoning(tagged(f"{letter}. {text}"), options).answer
        assert found == letter or (found is None and same)


HOSTILE = [
    *(
        "answer is ",
        "so ",
        "the ",
        "\\boxed{",
        "\\boxed{B}",
        "\\boxed{{",
        ", so ",
        "cyst ",
        "*",
        "((",
        "option ",
        "answer\n",
    ),
    *("B\n", ". ", "not ", "'", "most ", "{", "$", "`", "B. ", "answer: B ", "\\text"),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_half_a_megabyte_takes_seconds_at_most(piece: str) -> None:
    for text in (piece * (500_000 // len(piece)), "B. " + piece * (500_000 // len(piece)) + "the answer is B"):
        for options in (OPTIONS, "ABCD"):
            start = time.process_time()
            parse_reasoning(tagged(text), options)
            parse_reasoning(text, options)
            assert time.process_time() - start < 8.0  # in quadratic time it would be minutes
