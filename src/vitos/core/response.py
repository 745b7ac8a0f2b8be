"""Model text → evidence boxes and an answer (docs/method.md, section 5).

    localization   <think>…</think><evidence>[[x1, y1, x2, y2], …]</evidence><answer>B</answer>
    reasoning      <think>…</think><answer>B</answer>

In a prompt of several images a box begins with the number of its image: `[[2, x1, y1, x2, y2], …]`.

Parsing is total and never guesses: any string gives boxes or none, an answer or None, in linear time, and no
exception. Where a question has options, an answer is an option's letter, its letter with its text, or, word for word,
its text (`vitos.core.choice`); elsewhere it is the text as it was written.
There is no "first capital letter", no most similar option and no half-read box list, because a
policy under reward finds every such leniency. What could not be read stays visible: `evidence_parsed` and
`well_formed` are counted, and text without an answer is a third verdict (None), neither right nor wrong by accident.

`format_localization` and `format_reasoning` are the inverse, for supervised targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from vitos.core.choice import read_choice, text_of_one
from vitos.core.geometry import Box

CoordinateReader = Callable[[tuple[float, float, float, float]], Box | None]
"""Four numbers as the model wrote them → a box of the original image, or None if they are no valid box.

Each backbone has its own: `read_normalized` for 0..1, others for pixels of the resized image or 0..1000.
"""
ImageReader = tuple[int, CoordinateReader]
"""The place of an image among those of the question, from 1, and the reader of its coordinates."""

# A tag is exactly these characters: lower case, no white space, no attributes.
_TAG = re.compile(r"(</?(?:think|evidence|answer)>)")
_LOCALIZATION = ["<think>", "</think>", "<evidence>", "</evidence>", "<answer>", "</answer>"]
_REASONING = ["<think>", "</think>", "<answer>", "</answer>"]

# Evidence is JSON with decimals only. float() would also read "nan", "1e999999" and "٣"; no convention has a use for
# these or for a sign. Possessive quantifiers ("*+") never go back, so megabytes of hostile text cost linear time.
_NUMBER = r"(?:0|[1-9][0-9]{0,19}+)(?:\.[0-9]{1,20}+)?+"
_BOX = rf"\[\s*+{_NUMBER}(?:\s*+,\s*+{_NUMBER}){{3}}\s*+\]"
_BOX_IN_IMAGE = rf"\[\s*+[1-9][0-9]{{0,4}}+(?:\s*+,\s*+{_NUMBER}){{4}}\s*+\]"
_NUMBERS = re.compile(_NUMBER)


def _list_of(box: str) -> re.Pattern[str]:
    return re.compile(rf"\[\s*+{box}(?:\s*+,\s*+{box})*+\s*+\]", re.ASCII)


# Numbers of a box → one box, and a list of such boxes.
_FORMS = {
    4: (re.compile(_BOX, re.ASCII), _list_of(_BOX)),
    5: (re.compile(_BOX_IN_IMAGE, re.ASCII), _list_of(_BOX_IN_IMAGE)),
}


@dataclass(frozen=True, slots=True)
class Response:
    """What could be read from one completion.

    Attributes:
        text: the completion without its end tokens.
        thought: the text inside the `<think>` tags, unchanged; None unless there is exactly one such block.
        boxes: the evidence, in 0..1 of the original image; empty if there is none or *any* of it is not valid.
        answer: letter of an option or, for a question without options, the text as it was written; None is the verdict
            "no answer".
        well_formed: whether the text is the branch's format, once, all parts readable, with nothing but white space
            around and between the blocks; the `format` reward.
    """

    text: str
    thought: str | None
    boxes: tuple[Box, ...]
    answer: str | None
    well_formed: bool

    @property
    def evidence_parsed(self) -> bool:
        """There is one evidence block, at least one valid box and nothing else in it. Always False for reasoning."""
        return bool(self.boxes)


def read_normalized(numbers: tuple[float, float, float, float]) -> Box | None:
    """The convention of the paper's data: x1, y1, x2, y2 in 0..1 of the original image. Nothing is clipped."""
    try:
        return Box(*numbers)
    except ValueError:
        return None


def parse_localization(
    text: str,
    options: Collection[str] | None = None,
    read_box: CoordinateReader | Mapping[int, ImageReader] = read_normalized,
    max_boxes: int = 32,
    *,
    written: bool = False,
) -> Response:
    """Read a completion of the localization branch. Never raises, whatever the text.

    Evidence: one block, strictly a list of boxes. One bad box (inverted, out of range, not four numbers), more than
    `max_boxes` boxes per image, or a second block, and there are none: the caller falls back to the dense image and
    counts it. A single box without the outer brackets is read, but is not `well_formed`.

    Answer: see `_read_answer`.

    Args:
        options: the letters that may be chosen, or letter → text, such as `record.options`, whose texts are then
            answers as well; None or empty (not known): any letter of A-Z.
        read_box: the backbone's coordinate convention; for a prompt of several images that of each one, by the number
            that the prompt gives it (`vitos.core.numbering`). Then a box is five numbers, the first of them that.
        max_boxes: largest number of boxes in an image.
        written: whether the answer is a text in the model's own words, as `read_answer_text` reads it, not a letter.
    """
    parts = _TAG.split(text)
    blocks = _blocks(parts, "evidence")
    boxes = _read_boxes(blocks[0], read_box, max_boxes) if len(blocks) == 1 else ()
    listed = bool(boxes) and not any(one.fullmatch(blocks[0].strip()) for one, _ in _FORMS.values())
    return _response(text, parts, boxes, options, written, well_formed=listed and _has_format(parts, _LOCALIZATION))


def parse_reasoning(text: str, options: Collection[str] | None = None, written: bool = False) -> Response:
    """Read a completion of the reasoning branch, as `parse_localization` does; it never has boxes."""
    parts = _TAG.split(text)
    return _response(text, parts, (), options, written, well_formed=_has_format(parts, _REASONING))


def read_answer_text(text: str) -> str | None:
    """The text that a completion answers with, for questions without options; None, "no answer", if there is none.

    With an answer tag anywhere: the content of the answer blocks, which must be the same in all. Without: the text
    behind the last closing tag, or all of it where there is no tag; nothing of an unfinished thought. Never raises.
    """
    parts = _TAG.split(text)
    if "<answer" in text or "</answer" in text:
        found = {block.strip() for block in _blocks(parts, "answer")}
        return (found.pop() or None) if len(found) == 1 else None
    if parts[1::2] and not parts[-2].startswith("</"):
        return None
    return parts[-1].strip() or None


def format_box_list(numbers: Sequence[Sequence[str]]) -> str:
    """Boxes as text, `[[0.10, 0.20, 0.30, 0.40], …]`, from numbers already written in the backbone's convention.

    Raises:
        ValueError: if there is no box, or a box is not four plain decimals, in all boxes alike with the number of an
            image in front or without; such text would not parse.
    """
    rows = ["[" + ", ".join(row) + "]" for row in numbers]
    box, _ = _FORMS[5 if any(len(row) == 5 for row in numbers) else 4]
    for row in rows:
        if not box.fullmatch(row):
            raise ValueError(
                "a box needs four plain decimal numbers such as 0.25, in a prompt of several images with the image's "
                f"number in front in every box; got {row[:80]!r}"
            )
    if not rows:
        raise ValueError("an evidence list needs at least one box; leave questions without boxes out")
    return "[" + ", ".join(rows) + "]"


def format_localization(thought: str, boxes_text: str, answer: str) -> str:
    """The text that `parse_localization` reads back; `boxes_text` is from `format_box_list`.

    Raises:
        ValueError: if a part would not be read back.
    """
    if not any(boxes.fullmatch(boxes_text) for _, boxes in _FORMS.values()):
        raise ValueError(f"boxes must be written by format_box_list, got {boxes_text[:80]!r}")
    return f"{_format_thought(thought)}<evidence>{boxes_text}</evidence>{_format_answer(answer)}"


def format_reasoning(thought: str, answer: str) -> str:
    """The text that `parse_reasoning` reads back.

    Raises:
        ValueError: if a part would not be read back.
    """
    return _format_thought(thought) + _format_answer(answer)


def _response(
    text: str,
    parts: list[str],
    boxes: tuple[Box, ...],
    options: Collection[str] | None,
    written: bool,
    well_formed: bool,
) -> Response:
    thoughts = _blocks(parts, "think")
    answer = read_answer_text(text) if written else _read_answer(text, parts, options)
    return Response(
        text=text,
        thought=thoughts[0] if len(thoughts) == 1 else None,
        boxes=boxes,
        answer=answer,
        # The letter or the text alone: "B) nodule" is an answer, but not the format. The answer is the last block.
        well_formed=well_formed
        and answer is not None
        and (written or answer in (parts[-3].strip(), text_of_one(parts[-3], options))),
    )


def _blocks(parts: list[str], name: str) -> list[str]:
    """Contents of all `<name>…</name>`; none at all if one of these tags is unpaired or has another tag inside.

    `parts` is text, tag, text, tag, …, text.
    """
    start, end = f"<{name}>", f"</{name}>"
    tags = parts[1::2]
    found = [
        content
        for opening, content, closing in zip(tags, parts[2::2], tags[1:], strict=False)
        if opening == start and closing == end
    ]
    return found if tags.count(start) == tags.count(end) == len(found) else []


def _has_format(parts: list[str], tags: list[str]) -> bool:
    """Exactly these tags in this order, and only white space outside of the blocks."""
    return parts[1::2] == tags and not any(between.strip() for between in parts[::4])


def _read_boxes(block: str, read_box: CoordinateReader | Mapping[int, ImageReader], max_boxes: int) -> tuple[Box, ...]:
    """All boxes of a strict list, or of one flat box; () if anything in the block is not valid."""
    several = isinstance(read_box, Mapping)
    width = 5 if several else 4
    block = block.strip()
    if not any(form.fullmatch(block) for form in _FORMS[width]):
        return ()
    values = [float(number) for number in _NUMBERS.findall(block)]
    if len(values) > width * max_boxes * (len(read_box) if isinstance(read_box, Mapping) else 1):
        return ()
    boxes = []
    for row in zip(*(values[axis::width] for axis in range(width)), strict=True):
        box = _read_box_in_image(row, read_box) if isinstance(read_box, Mapping) else read_box(row)
        if box is None:
            return ()
        boxes.append(box)
    return tuple(boxes)


def _read_box_in_image(row: tuple[float, ...], readers: Mapping[int, ImageReader]) -> Box | None:
    """Five numbers → a box in the image that the first one names; None if there is no such image."""
    number, x1, y1, x2, y2 = row
    if number not in readers:
        return None
    place, read_box = readers[int(number)]
    box = read_box((x1, y1, x2, y2))
    return None if box is None else replace(box, image=place)


def _read_answer(text: str, parts: list[str], options: Collection[str] | None) -> str | None:
    """The letter of the one option that the text answers with, else None.

    With an answer tag anywhere: every block must state a letter or hold an option's text, and all the same option.
    Without: what is behind the last closing tag, or all of the text, must state a letter: a text may be anything.
    """
    if "<answer" in text or "</answer" in text:
        blocks = _blocks(parts, "answer")
        letters = {read_choice(block, options) or text_of_one(block, options) for block in blocks}
        return letters.pop() if len(letters) == 1 else None
    if parts[1::2] and not parts[-2].startswith("</"):
        return None  # cut off inside a block: "the answer is B" may be the start of "… is Benign" or of a detour
    return read_choice(parts[-1], options)


def _format_thought(thought: str) -> str:
    if _TAG.search(thought):
        raise ValueError(f"a thought must not hold think, evidence or answer tags, got {thought[:80]!r}")
    return f"<think>{thought}</think>"


def _format_answer(answer: str) -> str:
    if not answer.strip() or _TAG.search(answer):
        raise ValueError(f"an answer is an option's letter or text, without tags, got {answer[:80]!r}")
    return f"<answer>{answer}</answer>"
