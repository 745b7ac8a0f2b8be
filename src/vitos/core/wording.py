"""One form for texts that differ only in writing: what two answers are compared in.

    normalize_answer("The Left-Lung.")  ->  "left lung"          normalize_answer("HER2-")  ->  "her2 -"

Case, spaces, quotes, brackets, sentence marks, Markdown emphasis and Unicode's compatibility forms do not count. What
a clinician reads as a difference does: signs, relations, arrows, units, percent and degree signs, exponents, slashes,
numbers, and single letters that are names ("hepatitis A"). Where it is not clear what a mark means, it is kept: two
texts that are told apart without need cost a right answer, two that are taken for one make a wrong answer right.

The rules are ours; there is no standard to cite. All of them take linear time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_SIGNS = {
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u02d7\u2796\ufe58\ufe63\uff0d",
    '"': "“”„‟«»″〝〞「」『』",
    "'": "‘’‚‛‹›′`´ʼ",
    "≤": "≦⩽⪅≲",
    "≥": "≧⩾⪆≳",
    "~": "≈≃≅∼〜",
    "→": "⟶➔➜➝➞➡⇒⟹",
    "←": "⟵⬅⇐⟸",
    "↔": "⟷⬌⇔",
    "↑": "⬆⇑",
    "↓": "⬇⇓",
    "°": "˚",
    "/": "⁄∕",
    " x ": "×✕✖⨯",
    " ": "•‣◦▪",
    "": "™℠®©",
}
_FOLD = str.maketrans({sign: form for form, signs in _SIGNS.items() for sign in signs})

# --- exponents, fractions, case -------------------------------------------------------------------------------------

_RAISED_RUN = re.compile(r"[⁰¹²³⁴-⁹⁺⁻⁼⁽⁾]+")
_LOWERED_RUN = re.compile(r"[₀-₉₊₋₌₍₎]+")
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()" * 2)
_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅟↉])")
# The exponent of a unit says no more than the digit: m² is m2, s⁻¹ is s-1. But 10² is not 102, and T² is not T2.
_UNIT_POWER = re.compile(r"(?<![^\W\d_])((?:[kcdmnuμ]?m|in|ft|[mu]?l|[km]?g|m?s|min|h|χ)) ?\^ ?(-?\d)(?!\d)")
_ION = re.compile(r"(?<=[^\W\d_])\^(\d?[+-])(?!\d)")
# Genotypes differ by case: Aa is not aa. Pairs of Roman digits (II, mm, cc, XX) are no genotypes.
_PAIRS = re.compile(r"(?<!\w)(?:([a-z])\1)+(?!\w)", re.IGNORECASE)
_GENETIC = re.compile(r"genotyp|allel|homozyg|heterozyg", re.IGNORECASE)

# --- marks ----------------------------------------------------------------------------------------------------------

_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\W\d_])")  # but HLA-B*27 and *1/*2
_EMPHASIS_END = re.compile(r"(?<=[\w.!?])\*(?![\w*])")  # only behind an opening one: T2* is a sequence
_REWRITTEN = (
    (re.compile(r"<-+>"), "↔"),
    (re.compile(r"-+>"), "→"),
    (re.compile(r"<-+(?! ?[\d.])"), "←"),
    (re.compile(r">/?="), "≥"),
    (re.compile(r"<=|</=|=<"), "≤"),
    (re.compile(r"!=|=/="), "≠"),
    (re.compile(r"(?<=\d) ?\+ ?/ ?- ?(?=[\d.])"), " ± "),
    (re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])"), ""),  # Crohn's
    (re.compile(r"(?<![\w.,])\.(?=\d)"), "0."),
    (re.compile(r"(^|[<>≤≥=~±+-]) ?,(?=\d)"), r"\g<1>0,"),
    (re.compile(r"(?<=\d) ?x(?: ?(?=\d)|(?!\w))"), " x "),
    (_ION, r"\1"),
    (_UNIT_POWER, r"\1\2"),
)
_UNITS = (
    "mm|cm|dm|m|km|nm|um|μm|in|ft|ml|l|dl|ul|μl|fl|mg|g|kg|mcg|ug|μg|ng|pg|mmhg|bpm|hz|khz|mhz|kv|kvp|ma|mas|msv|mgy|"
    "gy|ms|s|sec|min|h|hr|hrs|d|wk|wks|mo|y|yr|yrs|days?|weeks?|months?|years?|hours?|minutes?|seconds?|iu|u|mol|mmol|"
    "meq|kcal|cal|t|hu|fr|ga"
)
_GLUED_UNIT = re.compile(rf"(?<![^\W_])(?<!\d[.,])(\d+(?:[.,]\d+)*+)({_UNITS})(?![^\W_])")
_END, _MARK = "\x1e", "\x1f"  # in the place of a mark that ends a sentence, and of another that carries no meaning
_GAPS = f" {_END}{_MARK}"
_MARKS = re.compile(
    r"(?P<kept>(?<=\d)(?:[.,]| ?: ?)(?=\d))|(?P<prime>(?<=\d)['\"])|(?P<end>[.!?;。…])|"
    r"[,:、()\[\]{}《》〈〉【】〔〕¿¡'\"]"
)
_QUOTED = re.compile(r"(?<![\w'\"])['\"]")
_GAP = re.compile(rf"[{_GAPS}]+")
_PIECE = re.compile(rf"[{_GAPS}]|(?:\d+(?:[.,]\d+)*+|[^\W\d_])+['\"]?|-+|.", re.DOTALL)
# A sign behind a name: "HER2-", "HER2 +", "ER -/PR +". Then every other hyphen may be one: "ER-PR-".
_SIGNED = re.compile(rf"\w-+(?=[{_GAPS}]|$|[^\w\s-])|\w -+(?=[{_END}{_MARK}]|$|[^\w\s-])|\w ?\+(?!\w)")

# From one to the other, not a compound: T1-T4, I-III, A-C.
_RANGE = re.compile(
    rf"\d[{_GAPS}]?-[{_GAPS}]?[^\W\d_]+\d|(?<!\w)(?:[ivx]+|[^\W\d_])[{_GAPS}]?-[{_GAPS}]?(?:[ivx]+|[^\W\d_])(?!\w)"
)
_NEAR = 12  # characters on either side in which a range is looked for

# --- articles -------------------------------------------------------------------------------------------------------

_ARTICLES = ("a", "an", "the")
# An article is at the start or behind one of these. Behind other words "a" is a name: vitamin A deficiency.
_FUNCTION_WORDS = """
    is are was were be been being has have had with without of in on at by from to into onto within near under over
    above below between through as for and or but like than no not only also just it this that these those there
    here shows show showing shown sees see seen suggests suggest indicates indicate demonstrates demonstrate reveals
    reveal represents represent depicts depict means mean contains contain
"""
_BEFORE_ARTICLE = frozenset(_FUNCTION_WORDS.split())
# In front of these words "a" is a name wherever it is: A positive, A line, A and B.
_NAMED_WORDS = """
    positive negative pos neg ve wave waves line lines band bands fib flutter delta beta alpha type rh blood
    antigen antigens allele alleles chain chains plus minus versus vs an a the
"""
_BEHIND_NAME = _BEFORE_ARTICLE | frozenset(_NAMED_WORDS.split())


@dataclass(frozen=True, slots=True)
class _Token:
    """A word, a number or a sign.

    Attributes:
        gap: what is between it and the token before it: "" nothing, " " white space, or a dropped mark.
    """

    text: str
    gap: str


def normalize_answer(text: str) -> str:
    """The text in the form in which answers are compared; a text in this form stays as it is.

    Words, numbers and signs are apart by one space; a minus is attached to what follows. The articles a, an and the
    are left out in front of a word where they are no names. A text of marks alone keeps them.

    >>> normalize_answer("A cyst, < 5mm.") == normalize_answer("cyst < 5 mm")
    True
    >>> normalize_answer("Hepatitis A") == normalize_answer("hepatitis")
    False
    """
    form = _normalize(text)
    for _ in range(4):  # a mark can come to the front when others have gone, as in "(# cyst"
        again = _normalize(form)
        if again == form:
            break
        form = again
    return form


def _normalize(text: str) -> str:
    folded = _fold(text)
    words = _without_articles(list(_tokens(_separated(_rewritten(folded)))))
    return " ".join(words or folded.split() or text.split())


# --- one spelling ---------------------------------------------------------------------------------------------------


def _fold(text: str) -> str:
    """Compatibility forms, look-alike signs and case in one form; white space as single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_FOLD)
    scripts = _LOWERED_RUN.sub(_lowered, _RAISED_RUN.sub(_raised, text))
    plain = re.sub(r"(\d ?)º", r"\1°", _FRACTION.sub(" ", scripts))
    composed = unicodedata.normalize("NFKC", plain).translate(_FOLD)
    visible = "".join(letter for letter in composed if unicodedata.category(letter) != "Cf")
    return " ".join(_fold_case(visible).split())


def _raised(match: re.Match[str]) -> str:
    """A superscript as ^ and its digits; plain in front of an element, and as the charge of an ion."""
    digits, before = match[0].translate(_PLAIN), match.string[: match.start()][-1:]
    power = before.isalnum() or before in (")", "]")
    ion = before.isalpha() and digits[-1] in "+-"
    return f"^{digits}" if power and not ion and any(map(str.isdigit, digits)) else digits


def _lowered(match: re.Match[str]) -> str:
    """A subscript as plain digits, CO₂ is CO2, but for one behind a digit: 10₂ is not 102."""
    digits, before = match[0].translate(_PLAIN), match.string[: match.start()][-1:]
    return f" _ {digits}" if before.isdigit() else digits


def _fold_case(text: str) -> str:
    """Lower case, but for the genotypes of a text that has them."""
    pairs = list(_PAIRS.finditer(text))
    if not any(map(_is_genotype, pairs)) and not (pairs and _GENETIC.search(text)):
        return text.casefold()
    out, start = [], 0
    for pair in pairs:
        out.append(text[start : pair.start()].casefold())
        out += ["".join(sorted(pair[0][i : i + 2])) for i in range(0, len(pair[0]), 2)]  # aA is Aa
        start = pair.end()
    return "".join(out) + text[start:].casefold()


def _is_genotype(pairs: re.Match[str]) -> bool:
    """Whether there is one upper and one lower letter, which are no Roman digits."""
    both = zip(pairs[0][::2], pairs[0][1::2], strict=True)
    return any(first != second and first.lower() not in "ivxlcdm" for first, second in both)


def _rewritten(text: str) -> str:
    """Signs that can be written in several ways in one of them, without emphasis, units apart from their numbers."""
    text = _BOLD.sub("", text)
    if _EMPHASIS.search(text):
        text = _EMPHASIS_END.sub("", _EMPHASIS.sub("", text))
    for pattern, form in _REWRITTEN:
        text = pattern.sub(form, text)
    return _GLUED_UNIT.sub(r"\1 \2", text)


# --- marks and words ------------------------------------------------------------------------------------------------


def _separated(text: str) -> str:
    """Marks without a meaning as `_END` or `_MARK`; of marks and spaces in a row there is one.

    Behind a digit a quote is a sign for feet, minutes or inches, where nothing is in quotes.
    """
    quoted = _QUOTED.search(text) is not None

    def drop(match: re.Match[str]) -> str:
        if match["kept"] or (match["prime"] and not quoted):
            return match[0]
        return _END if match["end"] else _MARK

    text = re.sub(r"(?<! )_|_(?! )", " ", _MARKS.sub(drop, text))
    return _GAP.sub(lambda gap: next((mark for mark in (_END, _MARK) if mark in gap[0]), " "), text)


def _tokens(text: str) -> Iterator[_Token]:
    signed = _SIGNED.search(text) is not None
    gap, minus = "", ""  # since the last token; minus signs wait for what they belong to
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece in _GAPS:
            gap = piece if gap in ("", " ") else gap
        elif piece[0] == "-" and not signed and _is_hyphen(text, match.start(), match.end()):
            gap = gap or " "
        elif piece[0] == "-":
            minus += piece
        else:
            sign = "-" if minus and piece[0].isalnum() else ""
            yield from (_Token(one, gap) for one in minus.removesuffix(sign))
            yield _Token(sign + piece, gap)
            gap, minus = "", ""
    yield from (_Token(one, gap) for one in minus)


def _is_hyphen(text: str, start: int, end: int) -> bool:
    """Whether the dashes join or part words, as in "T-cell", "cyst - benign" and "- cyst"; all others are signs."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if _RANGE.search(f"{text[max(0, start - _NEAR) : start]}-{text[end : end + _NEAR]}"):
        return False
    if before.isalnum() and after.isalpha():
        return re.match(r"ve(?!\w)", text[end : end + 3]) is None  # Gram-ve
    apart = (not before or before in _GAPS) and after != "" and after in _GAPS
    return apart and text[end + 1 : end + 2].isalpha() and (start < 2 or text[start - 2].isalnum())


def _without_articles(tokens: list[_Token]) -> list[str]:
    """The words, without a, an and the in front of a word; an "a" behind a mark is a letter, as in "A. nodule"."""
    words: list[str] = []
    for index, token in enumerate(tokens):
        word, following = token.text, tokens[index + 1] if index + 1 < len(tokens) else None
        if word in _ARTICLES and following is not None and _may_follow(following.text, word):
            article = word == "the" or _may_precede(words)
            if following.gap == " " and (article or token.gap == _END):
                continue
            if article:
                word += "."  # or it would be an article when the marks are gone
        words.append(word)
    return words


def _may_follow(word: str, article: str) -> bool:
    if article == "the":
        return word[0].isalnum()
    return len(word) > 1 and word[0].isalpha() and word not in _BEHIND_NAME


def _may_precede(words: list[str]) -> bool:
    listed = len(words) > 1 and words[-1] in ("and", "or") and len(words[-2]) == 1  # vitamins D and A
    return not words or (words[-1] in _BEFORE_ARTICLE and not listed)
