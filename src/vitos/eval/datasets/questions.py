"""From a question in the words of a release to the question, answer and kind of a `Record`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vitos.core.record import IMAGE_PLACEHOLDER, AnswerKind, option_lines, parse_options
from vitos.core.wording import normalize_answer
from vitos.eval.datasets.rows import RowError

YES_NO = ("yes", "no")
_LINE_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRow:
    """What a row of a release means.

    Attributes:
        text: the question with options inline and `<image>` where images belong; images without one come first.
        images: the bytes of each image file, or its name in the release, in the order of the `<image>`s.
        answer, kind: right answer and its kind, as in `Record`.
        meta: fields for tables.
    """

    text: str
    images: tuple[bytes | str, ...]
    answer: str
    kind: AnswerKind
    meta: dict[str, str] = field(default_factory=dict)


def with_options(
    text: str, options: Sequence[str | None], *, letter: str | None = None, answer: str | None = None
) -> tuple[str, str]:
    """A question with its options inline, relettered from A without gaps, and the letter of the right option.

    Args:
        text: the question without options.
        options: options of the release, the first one A; blank or None where there is none. If every option begins
            with its own letter ("B: nodule" in the second place), the letters are removed.
        letter: the right option's letter in the release.
        answer: the right option's text, if the release gives no letter. Only the caller knows which of the two it is:
            with the options "A" and "B" of a blood group, "A" could be either.

    Raises:
        RowError: if there are fewer than two options, the answer is none of them or several, or the options
            cannot be read back from the question.
    """
    given = [(chr(ord("A") + index), (option or "").strip()) for index, option in enumerate(options)]
    listed = _without_own_letters([(place, option) for place, option in given if option])
    if len(listed) < 2:
        raise RowError(f"has {len(listed)} options; a choice needs two")
    right = _by_letter(listed, letter) if letter is not None else _by_text(listed, answer or "")
    texts = [_LINE_BREAK.sub(" ", option) for _, option in listed]
    question = text.strip() + option_lines(texts)
    if list(parse_options(question).values()) != texts:
        raise RowError("its options cannot be told from the question's text or from one another")
    return question, chr(ord("A") + right)


def yes_no_or(kind: AnswerKind, text: str, answer: str) -> tuple[str, str, AnswerKind]:
    """A question with the options yes and no if its answer is one of them; any other unchanged, of kind `kind`."""
    word = normalize_answer(answer)
    if word not in YES_NO:
        return text.strip(), answer, kind
    question, letter = with_options(text, YES_NO, answer=word)
    return question, letter, "letter"


def place_images(text: str, count: int) -> str:
    """The text with one `<image>` per image; images that it does not mention come first.

    Raises:
        RowError: if it mentions more images than there are.
    """
    called = text.count(IMAGE_PLACEHOLDER)
    if called > count:
        raise RowError(f"calls {called} images, but has {count}")
    return IMAGE_PLACEHOLDER * (count - called) + text


def _without_own_letters(listed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove the letters if every option begins with its own; one alone may be a word ("C. difficile" in place C)."""
    found = [re.fullmatch(rf"\(?{letter}\s*[).:]\s*(.*)", option, re.DOTALL) for letter, option in listed]
    if not all(found):
        return listed
    bare = [(letter, match[1].strip()) for (letter, _), match in zip(listed, found, strict=True) if match]
    return [(letter, option) for letter, option in bare if option]


def _by_letter(listed: Sequence[tuple[str, str]], letter: str) -> int:
    for index, (place, _) in enumerate(listed):
        if place == letter.strip():
            return index
    raise RowError(f"the answer {letter[:40]!r} is the letter of no option")


def _by_text(listed: Sequence[tuple[str, str]], answer: str) -> int:
    """The option that equals the answer, as written or else normalised."""
    found = [index for index, (_, option) in enumerate(listed) if option == answer.strip()]
    if not found:
        same = normalize_answer(answer)
        found = [index for index, (_, option) in enumerate(listed) if normalize_answer(option) == same]
    if len(found) != 1:
        many = f"the text of {len(found)} options" if found else "not among the options"
        raise RowError(f"the answer {answer[:40]!r} is {many}")
    return found[0]
