"""Numbers of a question's images, as the prompt writes them and as evidence names them (docs/method.md, section 5).

A prompt of several images writes a number in front of each one, so that an answer can name it and a box can say where
it lies. The numbers are part of the text: `Slice 17: <image>` is image 17 of that prompt. A question that numbers all
its images itself keeps its own words; otherwise they are called `Image 1:`, `Image 2:` and so on. A question about one
image has no number.
"""

from __future__ import annotations

import re

IMAGE_PLACEHOLDER = "<image>"

_OWN = re.compile(rf"\b[^\W\d_]+ ([1-9][0-9]{{0,4}}):[ \t]?(?={IMAGE_PLACEHOLDER})")


def numbered(question: str) -> str:
    """The question with a number in front of each image, where there are several and it does not number all of them.

    >>> numbered("<image><image>What has changed?")
    'Image 1: <image>\\nImage 2: <image>\\nWhat has changed?'
    >>> numbered("<image>What is shown?")
    '<image>What is shown?'
    """
    first, *rest = question.split(IMAGE_PLACEHOLDER)
    if len(rest) < 2 or _own_numbers(question):
        return question
    out = first
    for number, text in enumerate(rest, start=1):
        out += " " if re.search(r"\w\Z", out) else ""
        out += f"Image {number}: {IMAGE_PLACEHOLDER}" + ("" if not text or text[0].isspace() else "\n") + text
        # Directly followed by the next image: that one begins a line as well.
        out += "\n" if not text and number < len(rest) else ""
    return out


def image_numbers(question: str) -> tuple[int, ...]:
    """The number of each image of a question, in order; the same before and after `numbered`.

    >>> image_numbers("Slice 4: <image>\\nSlice 8: <image>\\nWhich slice shows the nodule?")
    (4, 8)
    """
    return _own_numbers(question) or tuple(range(1, question.count(IMAGE_PLACEHOLDER) + 1))


def _own_numbers(question: str) -> tuple[int, ...]:
    """The numbers that a question gives its images itself; () unless all images have one and no two the same."""
    found = tuple(int(number) for number in _OWN.findall(question))
    return found if len(set(found)) == question.count(IMAGE_PLACEHOLDER) == len(found) else ()
