"""Texts that a clinician reads differently never become one; texts that differ only in writing do."""

import itertools
import string
import time
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vitos.core.wording import normalize_answer

# Each row: answers that a clinician tells apart, all of them from one another.
DIFFERENT = [
    ("-5", "5", "+5", "±5", "<5", ">5", "≤5", "≥5", "~5", "≠5", "=5", "5%", "5°", "5+", "0.5", "55", "5'", "$5", "#5"),
    ("HER2+", "HER2-", "HER2", "HER2 2+", "HER2 ±"),
    ("ER+ PR-", "ER- PR+", "ER+ PR+", "ER- PR-", "ER PR", "ER+ PR"),
    ("ER+/PR-", "ER-/PR+", "ER/PR"),
    ("< 5 mm", "> 5 mm", "≤ 5 mm", "≥ 5 mm", "5 mm", "-5 mm", "< -5 mm", "less than 5 mm", "more than 5 mm"),
    ("10²", "102", "10³", "10⁻²", "10-2", "10 2", "10₂"),
    ("T²", "T2", "T2*"),
    ("1.5", "15", "1,5", "1 5", ".15"),
    (".5", "5", ".05", "50"),
    (",5", "5"),
    ("5-10", "510", "5 10", "5/10", "5:10", "5.10"),
    ("120/80", "12080", "120 80"),
    ("1:4", "14", "1/4", "1.4", "1 4"),
    ("½", "12", "1 1/2", "11/2"),
    ("5 mg", "5 µg", "5 g", "5 kg", "5 ml", "5", "5 mg/dL", "5 mg/L"),
    ("5 m", "5 mm", "5 m/s"),
    ("37 °C", "37 °F", "37"),
    ("p<0.05", "p>0.05", "p=0.05"),
    ("↑", "↓", "→", "←", "↔", "↑↑"),
    ("A→B", "A←B", "A B"),
    ("c.35G>A", "c.35G>T", "c.35A>G", "c.35GA"),
    ("+/+", "+/-", "-/-", "-/+", "+", "-", "±", "++", "--"),
    ("*1/*2", "*1/*1", "*2/*2", "1/2"),
    ("HLA-B*27", "HLA-B*57", "HLA-B27"),
    ("46,XX", "46,XY", "47,XXY", "45,X"),
    ("Aa", "AA"),
    ("Aa", "aa"),
    ("genotype AA", "genotype Aa", "genotype aa"),
    ("AaBb", "AABB"),
    ("5q-", "5q", "5q+"),
    ("A+", "A-", "A", "AB+", "O-"),
    ("A positive", "positive", "B positive", "A negative"),
    ("Rh+", "Rh-", "Rh"),
    ("Gram -ve", "Gram +ve", "Gram ve"),
    ("Gram-ve", "Gram+ve"),
    ("hepatitis A", "hepatitis", "hepatitis B", "hepatitis C"),
    ("hepatitis A virus", "hepatitis virus", "hepatitis B virus"),
    ("vitamin A deficiency", "vitamin deficiency", "vitamin K deficiency"),
    ("vitamins D and A deficiency", "vitamins D and deficiency"),
    ("Stanford type A dissection", "Stanford type dissection", "Stanford type B dissection"),
    ("Child-Pugh A", "Child-Pugh", "Child-Pugh B"),
    ("group A streptococcus", "group streptococcus", "group B streptococcus"),
    ("type I", "type II", "type III", "type IV", "type", "type 1"),
    ("stage IIA", "stage IIB", "stage II", "stage IIIA"),
    ("T1N0M0", "T1N1M0", "T2N0M0"),
    ("A line", "line", "B line"),
    ("A. nodule", "nodule"),
    ("A) nodule", "a nodule"),
    ("T-score -2.5", "T-score 2.5", "T-score +2.5"),
    ("T-2.5", "T 2.5"),
    ("grade 1+", "grade 2+", "grade 1"),
    ("L4", "L5", "L4-5", "L4 5"),
    ("T1-T4", "T1, T4", "T1/T4"),
    ("stage I-III", "stage I, III"),
    ("A-C", "A, C"),
    ("A Rh positive", "Rh positive"),
    ("♂", "♀"),
    ("I", "1", "l 2"),
    ("2**3", "23"),
    ("x", "x²", "x^3"),
    ("no", "yes", "not"),
]


@pytest.mark.parametrize("answers", DIFFERENT, ids=lambda answers: answers[0])
def test_what_a_clinician_reads_differently_stays_different(answers: tuple[str, ...]) -> None:
    for one, other in itertools.combinations(answers, 2):
        assert normalize_answer(one) != normalize_answer(other), (one, other)


# Each row: answers that say the same, only written differently.
SAME = [
    (
        "The Left-Lung.",
        "left lung",
        "LEFT LUNG",
        "Left\n lung",
        "“left lung”",
        "'Left lung'",
        "**Left lung**",
        "left–lung",
    ),
    ("A cyst", "a cyst", "cyst", "the cyst", "Cyst.", "cyst!", "(cyst)", "*Cyst*", "`cyst`", "- cyst", "• cyst"),
    ("T-cell", "T cell", "T‑cell", "T−cell", "T–cell"),
    ("-5", "−5", "–5", "－5", "- 5", "‐5", "‑5", "-5."),
    ("< 5 mm", "<5mm", "<5 mm", "＜ 5 mm", "< 5 MM", "<  5  mm."),
    ("≤5", "<=5", "≦ 5", "</=5"),
    ("≥ 5", ">= 5", "⩾5", ">/= 5"),
    ("5 ± 2", "5±2", "5 +/- 2"),
    ("37 °C", "37°C", "37℃", "37 º C", "37 ° C"),
    ("50%", "50 %", "50％"),
    ("10²", "10^2", "10 ^ 2"),
    ("10⁻³", "10^-3"),
    ("kg/m²", "kg/m2", "kg / m^2"),
    ("CO₂", "CO2"),
    ("Ca²⁺", "Ca2+", "Ca^2+"),
    ("¹⁸F-FDG", "18F-FDG"),
    ("½", "1/2", "1⁄2"),
    ("1½", "1 1/2"),
    (".5 cm", "0.5 cm", "0.5cm"),
    ("HER2-", "HER2 -", "her2−", "HER2-.", "(HER2-)", "HER2 (-)"),
    ("HER2+, PR-", "HER2+ PR-", "HER2 +, PR -", "her2+; pr−"),
    ("ER+/PR+", "ER + / PR +"),
    ("5-10 mm", "5–10 mm", "5 - 10 mm", "5 – 10mm"),
    ("3 × 4 cm", "3x4 cm", "3 x 4cm"),
    ("3cm×4cm", "3 cm x 4 cm"),
    ("40×", "40x", "40 x"),
    ("G→A", "G->A", "G ⟶ A"),
    ("Crohn's disease", "Crohn’s disease", "CROHN'S DISEASE"),
    ("stage II", "stage Ⅱ", "Stage ii"),
    ("ﬁbrosis", "fibrosis"),
    ("ＣＴ", "ct"),
    ("It is a mass. A cyst is seen.", "it is mass cyst is seen"),
    ("in the right hilum", "In right hilum"),
    ("MRI - T2 weighted", "MRI-T2 weighted", "MRI — T2 weighted"),
    ("hepatitis A", "Hepatitis a", "HEPATITIS A."),
    ("左肺。", "左肺"),
    ("5'", "5′", "5’"),
    ("T1-T4", "T1 - T4", "T1–T4"),
    ("T1-weighted", "T1 weighted"),
    ("left\u200b lung", "left lung"),
    ("x_ray", "x ray", "X-ray"),
]


@pytest.mark.parametrize("answers", SAME, ids=lambda answers: answers[0])
def test_what_differs_in_writing_alone_becomes_the_same(answers: tuple[str, ...]) -> None:
    assert {normalize_answer(answer) for answer in answers} == {normalize_answer(answers[0])}


WORDS = st.sampled_from(
    [
        "cyst",
        "mass",
        "left",
        "right",
        "lobe",
        "nodule",
        "lung",
        "T2",
        "HER2",
        "CT",
        "stage",
        "II",
        "no",
        "yes",
        "normal",
        "pleural",
        "effusion",
    ]
)
SIGNS = st.sampled_from(
    ["+", "-", "±", "<", ">", "≤", "≥", "=", "~", "≠", "→", "←", "↑", "↓", "°", "%", "/", "²", "^", "$"]
)


@given(WORDS, SIGNS, SIGNS)
def test_signs_are_told_apart_on_either_side(word: str, one: str, other: str) -> None:
    assume(one != other and {one, other} != {"²", "^"})
    for form in ("{s}{w}", "{w}{s}", "{s} 5", "5{s}", "{w} {s} 5 mm"):
        texts = [form.format(s=sign, w=word) for sign in (one, other)]
        assert normalize_answer(texts[0]) != normalize_answer(texts[1]), texts
        if form != "{s}{w}":  # a dash in front of a word may be a bullet's
            assert normalize_answer(texts[0]) != normalize_answer(form.format(s="", w=word)), texts


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from(["", "-", "<", ">", "≥", "≤", "±", "~"]))
def test_numbers_and_their_signs_are_told_apart(one: int, other: int, sign: str) -> None:
    texts = [f"{one}", f"{other}", f"0.{one:03d}1", f"{one}.{other}", f"{sign}{one} mm", f"{one}-{other}"]
    different = {text.replace(" ", "") for text in texts}
    assert len({normalize_answer(text) for text in different}) == len(different)


@given(
    st.lists(WORDS, min_size=1, max_size=5),
    st.sampled_from([str, str.upper, str.title, str.capitalize, str.swapcase]),
    st.sampled_from(["", ".", "!", "?", ";", ":", " .", "。"]),
    st.sampled_from([("", ""), ('"', '"'), ("“", "”"), ("'", "'"), ("«", "»"), ("(", ")"), ("**", "**"), ("`", "`")]),
    st.sampled_from([" ", "  ", "\n", "\t", "\u00a0", "\u3000", ", ", "; "]),
    st.booleans(),
)
def test_case_marks_quotes_spaces_and_width_do_not_count(words, case, end, quotes, gap, wide) -> None:
    plain = " ".join(words)
    written = quotes[0] + gap.join(map(case, words)) + end + quotes[1]
    if wide:
        written = "".join(chr(ord(c) + 0xFEE0) if c in string.ascii_letters + string.digits else c for c in written)
    assert normalize_answer(written) == normalize_answer(plain)


_WRITTEN = "a an the is A and cyst - -- + . , ( ) 5 mm .5 * ** T2* ve _ # x ' \" ² 5' Aa AA → -> ± +/- < = > : 10"
_PIECES = _WRITTEN.split()


@given(st.text() | st.lists(st.sampled_from([*_PIECES, " ", "\n"])).map("".join))
@example("(# cyst")
@example("A. A) nodule")
@example("gram - ve")
def test_it_is_total_and_stable(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert bool(once) == bool(text.split())
    assert normalize_answer(unicodedata.normalize("NFD", text)) == normalize_answer(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    "piece", ["- ", "a ", "x", "*a", "#", "5", "5.", "'5", "Aa", "²", "<-", "(-", "+/-", "\n", "^"]
)
def test_it_takes_linear_time(piece: str) -> None:
    start = time.process_time()
    normalize_answer(piece * (150_000 // len(piece)))
    assert time.process_time() - start < 10  # in quadratic time it would be many minutes
