import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.quantity import is_within, quantity_problem, read_quantity

# Factors from the SI brochure and NIST SP 811, written here again and not taken from the code.
SAME = [
    ("1.2 cm", "12 mm"),
    ("12mm", "1.2cm."),
    ("The mass measures about 1.2 centimeters", "12 mm"),
    ("0.5 inch", "12.7 mm"),
    ("2 cm²", "200 mm^2"),
    ("2 ml", "2 cc"),
    ("1.5 l", "1,500 ml"),
    ("1,5 l", "1500 ml"),
    ("250 µg", "0.25 mg"),
    ("2 weeks", "14 days"),
    ("1 year", "12 months"),
    ("98.6 °F", "37 degrees Celsius"),
    ("100 mg/dL", "1 g/l"),
    ("-350 HU", "−350 hounsfield units"),
    ("3 x 2 cm", "20 × 30 mm"),
    ("6.5 x 6.2 x 8.8cm", "65 by 62 by 88 mm"),
    ("10-20 minutes", "10 to 20 min"),
    ("120/80 mmHg", "120 / 80 mmhg"),
    ("< 5 mm", "less than 0.5 cm"),
    ("two nodules", "2"),
    ("5 × 10^3 ml", "5 l"),
    ("about 5 percent", "5 %"),
]
DIFFERENT = [
    ("12", "12 mm"),  # a bare number may be of any unit
    ("12 mm", "12"),
    ("12 kg", "12 mm"),
    ("4 weeks", "1 month"),
    ("50 %", "0.5"),
    ("5 mm", "< 5 mm"),
    ("> 5 mm", "< 5 mm"),
    ("≤ 5 mm", "< 5 mm"),
    ("5 mm", "5-10 mm"),
    ("5 x 10 mm", "5-10 mm"),
    ("80/120 mmHg", "120/80 mmHg"),
    ("-5 °C", "5 °C"),
    ("102 mm", "10² mm"),
    ("5 mm/s", "5 mm"),
    ("5 mm²", "5 mm"),
    ("30 degrees", "30 °C"),
]
NONE = [
    "5 cm or 6 cm",
    "not 5 cm",
    "5 cm?",
    "5 cm, maybe 6",
    "between 4 and 6 cm",
    "if it is 5 cm",
    "T5",
    "7th rib",
    "3D",
    "v1.2",
    '5"',
    "1.2.3",
    "",
    "large",
    "5 m of 20 cm",
]


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same_in_another_unit_or_spelling(answer, gold):
    assert is_within(answer, gold) or quantity_problem(gold)
    a, b = read_quantity(answer), read_quantity(gold)
    assert a is not None
    assert b is not None
    assert (a.dimension, a.link, a.relation) == (b.dimension, b.link, b.relation)
    assert a.values == pytest.approx(b.values)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_what_cannot_be_compared_or_differs_is_not_right(answer, gold):
    assert quantity_problem(gold) or not is_within(answer, gold, "")


@pytest.mark.parametrize("text", NONE)
def test_no_quantity_is_guessed(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "right"),
    [
        ("0.3 cm", "2 mm", "1 mm", True),
        ("0.31 cm", "2 mm", "1 mm", False),
        ("3 mm", "2 mm", "0.1 cm", True),
        ("1.3 cm", "1.2 cm", "0.1", True),  # a bare tolerance is in the gold answer's unit
        ("13 mm", "1.2 cm", "0.1", True),
        ("14 mm", "1.2 cm", "0.1", False),
        ("110 mm", "10 cm", "10 %", True),
        ("111 mm", "10 cm", "10 %", False),
        ("55 %", "50 %", "5 %", True),  # points where the answer is in per cent
        ("56 %", "50 %", "5 %", False),
        ("33 x 20 mm", "2 x 3 cm", "10 %", True),
        ("33 x 23 mm", "2 x 3 cm", "10 %", False),
        ("3", "4", "1", True),
    ],
)
def test_tolerance(answer, gold, tolerance, right):
    assert is_within(answer, gold, tolerance) is right


@pytest.mark.parametrize(("gold", "tolerance"), [("large", ""), ("5 mm", "1 kg"), ("5 mm", "some"), ("5 mm", "-1 mm")])
def test_a_gold_answer_that_cannot_be_compared_is_an_error(gold, tolerance):
    assert quantity_problem(gold, tolerance)
    with pytest.raises(ValueError, match=r"known unit|cannot be compared"):
        is_within("5 mm", gold, tolerance)


@given(st.floats(0.001, 1e6, allow_nan=False), st.sampled_from([("mm", 1), ("cm", 10), ("m", 1000)]), st.data())
def test_a_length_is_the_same_in_every_unit(value, unit, data):
    other = data.draw(st.sampled_from([("mm", 1), ("cm", 10), ("m", 1000)]))
    converted = value * unit[1] / other[1]
    assert is_within(f"{converted:.12f} {other[0]}", f"{value:.12f} {unit[0]}", "0.001 %")
    assert not is_within(f"{converted * 1.01:.12f} {other[0]}", f"{value:.12f} {unit[0]}", "0.5 %")


@given(st.text())
def test_every_text_is_read(text):
    found = read_quantity(text)
    assert found is None or all(math.isfinite(value) for value in found.values)


@pytest.mark.parametrize("piece", ["1", "1 x ", "1,111", "5 ", "less than ", "1.5 x 10^", "5 mm", "- ", "five "])
def test_a_long_text_takes_linear_time(piece):
    start = time.perf_counter()
    read_quantity(piece * 50_000)
    assert time.perf_counter() - start < 5
