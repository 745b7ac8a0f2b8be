"""Options as the field writes them, what they are not, and what is refused."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.instructions import is_instruction, without_instruction
from vitos.core.options import option_lines, read_choices
from vitos.core.record import option_problems, parse_options, spell_answer

READ = [
    ("Q?\nA. cyst\nB. mass", ["cyst", "mass"]),
    ("Q?\nA) cyst\nB) mass", ["cyst", "mass"]),
    ("Q?\n(A) cyst\n(B) mass", ["cyst", "mass"]),
    ("Q?\nA: cyst\nB: mass", ["cyst", "mass"]),
    ("Q?\n[A] cyst\n[B] mass", ["cyst", "mass"]),
    ("Q?\nA、囊肿\nB、肿块", ["囊肿", "肿块"]),
    ("Q?\nA．囊肿\nB．肿块", ["囊肿", "肿块"]),
    ("Q?\na) cyst\nb) mass", ["cyst", "mass"]),
    ("Q?\n**A.** cyst\n**B.** mass", ["cyst", "mass"]),
    ("Q?\n**A**. cyst\n**B**. mass", ["cyst", "mass"]),
    ("Q?\n**A. cyst**\n**B. mass**", ["cyst", "mass"]),
    ("Q?\n**(A)** cyst\n**(B)** mass", ["cyst", "mass"]),
    ("Q?\n- A. cyst\n- B. mass", ["cyst", "mass"]),
    ("Q?\nOptions:\n\nA. cyst\n\nB. mass", ["cyst", "mass"]),
    ("Q?\nOption A: cyst\nOption B: mass", ["cyst", "mass"]),
    ("Q?\nA.\ncyst\nB.\nmass", ["cyst", "mass"]),
    ("Q?\r\nA. cyst\r\nB. mass\r\n", ["cyst", "mass"]),
    ("A:cyst,B:mass", ["cyst", "mass"]),
    ("Q? A:cyst, B:mass, left, C:none", ["cyst", "mass, left", "none"]),
    ("Q? A. cyst B. mass", ["cyst", "mass"]),
    ("Q? A) cyst B) mass", ["cyst", "mass"]),
    ("Q? (A) cyst (B) mass", ["cyst", "mass"]),
    ("Q? (A) cyst; (B) mass", ["cyst", "mass"]),
    ("Is it (A) a cyst, (B) a mass, or (C) none?", ["a cyst", "a mass", "none"]),
    ("Q? a. cyst b. mass", ["cyst", "mass"]),
    ("Q? **A.** cyst **B.** mass", ["cyst", "mass"]),
    ("Q? A. cyst\nB. mass", ["cyst", "mass"]),
    ("Q?\nA. x B. y\nC. z D. w", ["x", "y", "z", "w"]),
    ("图像中是什么？A.肺 B.肝", ["肺", "肝"]),
    ("图像中是什么？A、肺 B、肝", ["肺", "肝"]),
    ("Q?\nA. A\nB. B\nC. AB\nD. O", ["A", "B", "AB", "O"]),
    ("Q? A. A B. B C. AB D. O", ["A", "B", "AB", "O"]),
    ("Q? A. + B. -", ["+", "-"]),
    ("Q? A. < 5 mm B. > 5 mm", ["< 5 mm", "> 5 mm"]),
    ("Q?\nA. <image>\nB. neither", ["<image>", "neither"]),
    ("Q?\nA. cyst\nB. mass\n<image>", ["cyst", "mass"]),
    ("<question>Q?\nA. cyst\nB. mass\n</question>", ["cyst", "mass"]),
    ("> Q?\n> A. cyst\n> B. mass", ["cyst", "mass"]),
    ("Q?\nA. cyst\nB. mass\n---\nPlease answer in English.", ["cyst", "mass"]),
    ("Q?\nA.\n+\nB.\n-", ["+", "-"]),
    # What looks like a letter of an option and is none.
    ("Q?\nA. Stage I: early\nB. Stage II: late", ["Stage I: early", "Stage II: late"]),
    ("Q? A. Stage I: early B. Stage II: late", ["Stage I: early", "Stage II: late"]),
    ("Q? A. Hepatitis A. B. Hepatitis B. C. Hepatitis C.", ["Hepatitis A.", "Hepatitis B.", "Hepatitis C."]),
    ("Q? A. cyst B. Hepatitis C. infection", ["cyst", "Hepatitis C. infection"]),
    ("Q? A. Figure A: left B. Figure B: right", ["Figure A: left", "Figure B: right"]),
    ("In Figure A: what is it? A. cyst B. mass", ["cyst", "mass"]),
    ("Q? A. low grade B. high grade C. intermediate grade", ["low grade", "high grade", "intermediate grade"]),
    ("Q? A. early stage B. late stage C. none D. other", ["early stage", "late stage", "none", "other"]),
    ("Q? A. E. coli B. S. aureus C. C. difficile D. none", ["E. coli", "S. aureus", "C. difficile", "none"]),
    ("Q? A. S. aureus B. K. oxytoca C. other D. E. coli", ["S. aureus", "K. oxytoca", "other", "E. coli"]),
    ("Q? A. J. A. Smith B. K. B. Jones", ["J. A. Smith", "K. B. Jones"]),
    ("Described by J. A. Smith. Q? A. cyst B. mass", ["cyst", "mass"]),
    ("A. B. is a 45-year-old man.\nQ?\nA. cyst\nB. mass", ["cyst", "mass"]),
    ("Q? A. x - y B. z - w", ["x - y", "z - w"]),
    ("Q?\nA. vitamin B. complex\nB. none", ["vitamin B. complex", "none"]),
    ("Choose (A), (B) or (C). (A) cyst (B) mass (C) none", ["cyst", "mass", "none"]),
]


@pytest.mark.parametrize(("question", "texts"), READ)
def test_options_are_read_as_they_are_written(question: str, texts: list[str]) -> None:
    choices = read_choices(question)
    assert list(choices.options.values()) == texts
    assert list(choices.options) == list("ABCDEF"[: len(texts)])
    assert choices.problems == ()
    assert parse_options(question) == choices.options


@pytest.mark.parametrize(
    "question",
    [
        "What is it?",
        "A. only one",
        "A 45-year-old man",
        "- A finding\n- B finding",
        "Is this hepatitis A or hepatitis B?",
        "Compare Figure A: with Figure B: which is worse?",
        "Compare (A) and (B): which is abnormal?",
        "Is (A) larger than (B) in this image?",
        "Lesion A: bright. Lesion B: dark. Which?",
        "The patient has vitamin A. deficiency and hepatitis B. infection",
        "The patient has hepatitis A. B. cepacia was found. What now?",
        "Stage I: what is it? Stage II: none",
        "J. A. Smith and K. B. Jones described it",
    ],
)
def test_other_letters_are_no_options(question: str) -> None:
    assert read_choices(question).options == {}
    assert read_choices(question).problems == ()


REFUSED = [
    ("A. cyst\nwith fluid\nB. mass", {"A": "cyst\nwith fluid", "B": "mass"}, "line break in the option A"),
    ("A. cyst\nB. mass\nwith fluid", {"A": "cyst", "B": "mass\nwith fluid"}, "line break in the option B"),
    ("A. cyst\nB. mass\nThe end of it", {"A": "cyst", "B": "mass"}, "line behind the last option"),
    ("A. x\nA. y\nB. z", {}, "letter A twice"),
    ("A. x\nB. y\nB. z\nC. w", {}, "letter B twice"),
    ("A. x B. y B. z C. w", {}, "letter B twice"),
    ("A. x\nB. y\nD. z", {}, "letter D out of order"),
    ("A. cyst\nB. Cyst.", {"A": "cyst", "B": "Cyst."}, "same text for the options A and B"),
    ("A. \nB. x", {}, "no text for the option A"),
    ("A. x\nB. y\nWhich?\nA. z\nB. w", {}, "two lists of options"),
    ("A. x B. y, or (A) z (B) w", {}, "two lists of options"),
    (
        "A. cyst B. chronic hepatitis C. infection",
        {"A": "cyst", "B": "chronic hepatitis", "C": "infection"},
        "may be a name",
    ),
]


@pytest.mark.parametrize(("options", "read", "problem"), REFUSED)
def test_what_is_doubtful_is_said(options: str, read: dict[str, str], problem: str) -> None:
    question = f"What is it?\n{options}"
    assert parse_options(question) == read
    (found,) = option_problems(question)
    assert problem in found


INSTRUCTIONS = """
Answer with the option's letter from the given choices directly.
Answer with the option letter from the given choices directly.
Please select the correct answer from the options above.
Please answer directly with only the letter of the correct option and nothing else.
Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.
Answer the question using a single word or phrase.
Answer the question with one word.
Choose the best option.
Choose the correct answer from the following options.
Select one option from the provided choices.
Answer with the letter only.
Only return the letter of the correct answer.
Respond with only the letter (A, B, C, or D) of the correct option.
Please choose from A, B, C or D.
Answer with A or B.
Your answer should be one of A, B, C, D.
The answer should be a single letter.
Answer:
ANSWER:
Answer (letter only):
Let's think step by step.
Please reason step by step, and put your final answer within \\boxed{}.
First generate a step-by-step solution, then answer with the option’s letter from the given choices directly.
Your task: 1. Think through the question step by step, enclose your reasoning in <think>...</think> tags.
Output the thinking process in <think> </think> and final answer (option) in <answer> </answer> tags.
Do not explain your answer.
Just answer with the letter.
Give only the letter of your choice.
Which option is correct?
There is only one correct answer.
You must choose exactly one option.
Give your answer as A, B, C or D.
Based on the image, choose the correct option.
Carefully consider the options and select the best one.
In your answer, write only the letter.
As a radiologist, choose the correct answer.
If you are unsure, choose the most likely option.
No explanation needed.
Without any explanation, answer with the letter.
Letter only.
Use the image to answer the question.
(Answer with the letter only.)
[Select one]
Assistant:
### Response:
Context: N/A
请直接回答选项字母。
""".strip().splitlines()


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize(
    "question",
    [
        "Q?\nA. cyst\nB. mass\n{i}",
        "Q?\nA. cyst\nB. mass\n\n{i}\n",
        "Q?\nA. cyst\nB. mass. {i}",
        "Q? A. cyst B. mass\n{i}",
        "Q? A. cyst B. mass {i}",
        "Q? (A) cyst (B) mass {i}",
        "{i}\nQ?\nA. cyst\nB. mass",
        "{i} Q? A. cyst B. mass",
        "Q?\n{i}\nA. cyst\nB. mass",
        "Q? {i} A. cyst B. mass",
    ],
)
def test_an_instruction_is_no_part_of_an_option(question: str, instruction: str) -> None:
    choices = read_choices(question.format(i=instruction))
    assert [text.rstrip(".") for text in choices.options.values()] == ["cyst", "mass"]
    assert choices.problems == ()


@pytest.mark.parametrize(
    "text",
    [
        "Give oxygen",
        "Reassure the patient. Give fluids only",
        "Answer the patient's questions",
        "Select the smaller tube",
        "Stop the drug. Provide supportive care",
        "Choose surgery. Consider biopsy",
        "Use the other arm. Place a drain",
        "The correct answer is not listed",
        "None of the above",
        "All of the above",
        "No explanation",
    ],
)
def test_a_request_that_is_an_option_stays_one(text: str) -> None:
    assert without_instruction(text) == text
    for question in (f"Q?\nA. cyst\nB. {text}", f"Q? A. cyst B. {text}", f"Q?\nA. {text}\nB. cyst"):
        assert text in read_choices(question).options.values()


@pytest.mark.parametrize("line", ["of the left lung", "with contrast", "and a mass in the liver", "(see arrow)"])
def test_a_line_that_goes_on_with_an_option_is_no_instruction(line: str) -> None:
    assert not is_instruction(line)


_TEXTS = st.lists(
    st.text("abcdefgh ABC.:()-+<>123", min_size=1, max_size=20).map(str.strip).filter(bool), min_size=2, max_size=10
)


@given(_TEXTS)
def test_lines_of_options_are_read_back(texts: list[str]) -> None:
    """Whatever is in the texts, but for letters of options in the place of one."""
    assert list(parse_options("Which of these?" + option_lines(texts)).values()) == texts


@given(
    st.text()
    | st.lists(st.sampled_from(["A.", "B.", "(A)", "(B)", "C:", " ", "\n", "x", "?", "Answer", "**", ","])).map(
        "".join
    )
)
def test_any_question_is_read(question: str) -> None:
    choices = read_choices(question)
    assert list(choices.options) == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices.options)])
    assert len(choices.options) != 1
    assert all(text.strip() for text in choices.options.values())


def test_an_answer_is_spelt_without_the_instruction() -> None:
    question = "Q?\nA. cyst\nB. mass\nAnswer with the option's letter from the given choices directly."
    assert spell_answer(question, "B") == "B. mass"
    assert spell_answer("Q?", "mass") == "mass"


@pytest.mark.parametrize(
    "piece",
    [
        "A. ",
        "A. x B. y ",
        "(A) ",
        "A:",
        "hepatitis B. ",
        "\nA. x\nB. y",
        "\nB. x",
        "Choose ",
        "please ",
        "the answer ",
        "？",
    ],
)
def test_it_takes_linear_time(piece: str) -> None:
    start = time.process_time()
    read_choices("Q? A. x B. y" + piece * (80_000 // len(piece)))
    assert time.process_time() - start < 10  # in quadratic time it would be many minutes
