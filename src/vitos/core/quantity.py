"""Numbers with units in a text, and whether two of them are the same within a tolerance.

    "1.2 cm" is "12 mm"        "< 5 mm" is "less than 5 mm"        "3 x 2 cm" is "2 x 3 cm"        "two" is "2"

Nothing is guessed: a length and a mass, a length and a bare number, weeks and months, or a number and a range cannot
be compared, and what cannot be compared is not the same. A text with two separate numbers, or one with a doubt ("5 cm
or 6 cm", "not 5 cm", "5 cm?"), has no quantity.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Dimension → unit → factor to the first unit of the row. Names are in lower case and in the singular.
_FACTORS: dict[str, dict[str, float]] = {
    "length": {"mm": 1, "millimeter": 1, "millimetre": 1, "cm": 10, "centimeter": 10, "centimetre": 10, "dm": 100}
    | {"m": 1e3, "meter": 1e3, "metre": 1e3, "km": 1e6, "um": 1e-3, "micrometer": 1e-3, "micron": 1e-3, "nm": 1e-6}
    | {"inch": 25.4, "inches": 25.4, "ft": 304.8, "foot": 304.8, "feet": 304.8},
    "area": {"mm2": 1, "cm2": 100, "m2": 1e6},
    "volume": {"ml": 1, "milliliter": 1, "millilitre": 1, "cc": 1, "cm3": 1, "mm3": 1e-3, "ul": 1e-3, "dl": 100}
    | {"l": 1e3, "liter": 1e3, "litre": 1e3},
    "mass": {"mg": 1, "milligram": 1, "ng": 1e-6, "ug": 1e-3, "mcg": 1e-3, "g": 1e3, "gram": 1e3, "kg": 1e6},
    "time": {"s": 1, "sec": 1, "second": 1, "ms": 1e-3, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600}
    | {"day": 86400, "wk": 604800, "week": 604800},
    "months": {"mo": 1, "month": 1, "y": 12, "yr": 12, "year": 12},  # a month is no fixed number of days
    "pressure": {"mmhg": 1, "kpa": 7.500617},
    "frequency": {"hz": 1, "khz": 1e3, "mhz": 1e6},
    "rate": {"bpm": 1, "/min": 1, "per minute": 1},
    "absorbed dose": {"mgy": 1, "gy": 1e3, "cgy": 10},
    "equivalent dose": {"msv": 1, "sv": 1e3, "usv": 1e-3},
    "mass concentration": {"mg/l": 1, "mg/dl": 10, "g/l": 1e3, "g/dl": 1e4, "mg/ml": 1e3, "ug/ml": 1, "ng/ml": 1e-3},
    "molar concentration": {"mmol/l": 1, "umol/l": 1e-3, "mol/l": 1e3},
    "attenuation": {"hu": 1, "hounsfield unit": 1},
    "angle": {"°": 1, "deg": 1, "degree": 1},
    "temperature": {"°c": 1, "degrees celsius": 1, "celsius": 1, "°f": 5 / 9, "degrees fahrenheit": 5 / 9},
    "per cent": {"%": 1, "percent": 1, "per cent": 1},
}
_FREEZING = {"°f": 32.0, "degrees fahrenheit": 32.0}  # what is taken off before the factor
_UNITS = {name: (dimension, factor) for dimension, row in _FACTORS.items() for name, factor in row.items()}
_RELATIONS = {
    "<": ("<", "less than", "smaller than", "under", "below"),
    ">": (">", "more than", "greater than", "larger than", "over", "above"),
    "≤": ("≤", "<=", "at most", "up to", "no more than"),
    "≥": ("≥", ">=", "at least", "no less than"),
}
_RELATION_OF = {words: sign for sign, forms in _RELATIONS.items() for words in forms}
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_COUNT = {word: str(number) for number, word in enumerate(_COUNTS.split())}
_SIGNS = str.maketrans("−–‐‑×✕µμ⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "----xxuu-0123456789")
_RAISED = re.compile(r"(?<=\d)[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")


def _one_of(words: list[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_VALUE = (
    r"(?P<{n}>[-+]?(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,])(?:\.\d{{1,15}})?|\d{{1,15}}(?:[.,]\d{{1,15}})?|\.\d{{1,15}})"
    r"(?:e[-+]?\d{{1,2}}|\ ?x\ ?10\^[-+]?\d{{1,2}})?)"
    r"(?:\s{{0,2}}(?P<{u}>UNIT)s?\.?(?![\w^/%°]))?(?![\w^%°'\"″′]|\s?[a-z]{{1,9}}[/^])"
).replace("UNIT", _one_of(list(_UNITS)).replace("{", "{{").replace("}", "}}"))
_LINK = r"(?:\s{{0,2}}(?P<{l}>x|by|to|-|/)\s{{0,2}}"
_QUANTITY = re.compile(
    rf"(?:(?P<relation>{_one_of(list(_RELATION_OF))})\s{{0,2}})?(?<![\w.,^])"
    + _VALUE.format(n="a", u="ua")
    + _LINK.format(l="l1")
    + _VALUE.format(n="b", u="ub")
    + _LINK.format(l="l2")
    + _VALUE.format(n="c", u="uc")
    + ")?)?"
)
_DOUBT = re.compile(
    r"\b(?:not|no|nor|or|neither|either|between|maybe|perhaps|possibly|unless|if|could|might|but|instead|rather|wait|"
    r"unknown|unclear)\b|n['’]t\b|\?|[<>≤≥]"
)
_FILLER = re.compile(r"(?:about|approximately|approx|around|roughly|circa|ca|nearly|[\s~≈=.,:;!()*])*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number, a size such as 3 x 2 cm, a range such as 5-10 days, or a pair such as 120/80 mmHg.

    Attributes:
        values: its numbers in the smallest common unit of their dimension; those of a size in ascending order.
        dimension: "length", "mass" …; empty for a bare number or a count.
        link: "x", "-" or "/" between several numbers; empty for one.
        relation: "<", ">", "≤" or "≥" in front of it; empty for none.
        scale: size of the unit that was written in the smallest one.
        pure: whether the text holds nothing else but words such as "about".
    """

    values: tuple[float, ...]
    dimension: str
    link: str = ""
    relation: str = ""
    scale: float = 1.0
    pure: bool = True


def read_quantity(text: str) -> Quantity | None:
    """The only quantity in a text; None if there is none, several, one of mixed dimensions, or a doubt.

    >>> read_quantity("The mass measures 1.2 cm.").values, read_quantity("two nodules").values
    ((12.0,), (2.0,))
    >>> read_quantity("5 cm or 6 cm") is read_quantity("at T5") is None
    True
    """
    raised = _RAISED.sub(lambda match: "^" + match[0], text)
    plain = " ".join(raised.translate(_SIGNS).casefold().split())
    plain = re.sub(r"(?<=m)\^(?=[23])", "", plain)  # mm^2 is mm2
    if not any(sign.isdigit() for sign in plain):
        plain = re.sub(r"[a-z]+", lambda match: _COUNT.get(match[0], match[0]), plain)
    found = list(_QUANTITY.finditer(plain))
    if len(found) != 1:
        return None
    match = found[0]
    rest = plain[: match.start()] + " " + plain[match.end() :]
    if _DOUBT.search(rest) or any(sign.isdigit() for sign in rest):
        return None
    return _measured(match, pure=_FILLER.fullmatch(rest) is not None)


def _measured(match: re.Match[str], pure: bool) -> Quantity | None:
    numbers = [match[name] for name in "abc" if match[name] is not None]
    links = {{"by": "x", "to": "-"}.get(match[name], match[name]) for name in ("l1", "l2") if match[name]}
    written = [match[name] for name in ("ua", "ub", "uc")][: len(numbers)]
    units = [unit or next((later for later in written[i:] if later), None) for i, unit in enumerate(written)]
    dimensions = {_UNITS[unit][0] if unit else "" for unit in units}
    if len(dimensions) != 1 or len(links) > 1:
        return None
    values = [_value(number, unit) for number, unit in zip(numbers, units, strict=True)]
    link = next(iter(links), "")
    return Quantity(
        values=tuple(sorted(values) if link == "x" else values),
        dimension=dimensions.pop(),
        link=link,
        relation=_RELATION_OF[match["relation"]] if match["relation"] else "",
        scale=_UNITS[units[-1]][1] if units[-1] else 1.0,
        pure=pure,
    )


def _value(number: str, unit: str | None) -> float:
    mantissa, _, power = number.replace(" ", "").partition("x10^")
    thousands = re.fullmatch(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", mantissa)
    value = float(mantissa.replace(",", "" if thousands else ".")) * 10.0 ** int(power or 0)
    return value if unit is None else (value - _FREEZING.get(unit, 0.0)) * _UNITS[unit][1]


def is_within(given: str, gold: str, tolerance: str = "") -> bool:
    """Whether a text's quantity is that of the gold text, each number within the tolerance.

    >>> is_within("1.25 cm", "12 mm", "1 mm"), is_within("1.25 cm", "12 mm"), is_within("12 g", "12 mm", "1 mm")
    (True, False, False)

    Args:
        tolerance: a quantity of the gold's dimension ("1 mm"), a bare number in the gold's own unit, or a share of
            the gold value ("10 %"; for a gold answer in per cent these are points). Empty: equal to nine digits.

    Raises:
        ValueError: if `gold` is no quantity or the tolerance cannot be compared with it, as `quantity_problem` says.
    """
    if problem := quantity_problem(gold, tolerance):
        raise ValueError(problem)
    read, wanted = read_quantity(given), read_quantity(gold)
    if read is None or wanted is None:
        return False
    same = (read.dimension, read.link, read.relation, len(read.values))
    if same != (wanted.dimension, wanted.link, wanted.relation, len(wanted.values)):
        return False
    relative, absolute = _allowed(wanted, tolerance)
    # Rounding of the conversion must not decide: 0.3 cm is within 1 mm of 2 mm.
    return all(
        math.isclose(a, b, rel_tol=1e-9) or abs(a - b) <= (absolute + relative * abs(b)) * (1 + 1e-9)
        for a, b in zip(read.values, wanted.values, strict=True)
    )


def quantity_problem(gold: str, tolerance: str = "") -> str:
    """What is wrong with a gold answer that should be a quantity, as the end of a sentence; empty if nothing is.

    >>> quantity_problem("5 bananas")
    "is no number with a known unit: '5 bananas'"
    """
    wanted = read_quantity(gold)
    if wanted is None or not wanted.pure:
        return f"is no number with a known unit: {gold[:40]!r}"
    if not tolerance:
        return ""
    allowed = read_quantity(tolerance)
    if allowed is None or not allowed.pure or len(allowed.values) != 1 or allowed.values[0] < 0 or allowed.relation:
        return f"has the tolerance {tolerance[:40]!r}, which is no number with a known unit"
    if allowed.dimension not in ("", "per cent", wanted.dimension):
        return f"has the tolerance {tolerance[:40]!r}, which cannot be compared with {gold[:40]!r}"
    return ""


def _allowed(wanted: Quantity, tolerance: str) -> tuple[float, float]:
    """The tolerance as a share of the gold value and as a distance in the smallest unit."""
    allowed = read_quantity(tolerance)
    if allowed is None:
        return 0.0, 0.0
    (value,) = allowed.values
    if allowed.dimension == "per cent" != wanted.dimension:
        return value / 100, 0.0
    return 0.0, value if allowed.dimension else value * wanted.scale
