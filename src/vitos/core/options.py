"""The options in a question's text: found as the field writes them, or not at all.

    What is it?\\nA. cyst\\nB. mass          What is it? (A) cyst (B) mass          A:cyst,B:mass

One option per line is read line by line: whatever looks like a letter inside an option's text stays in it.
On one line, a letter begins an option only where all options have the same marks, and hardly behind a word that takes
a letter as its name ("hepatitis B."). An instruction is no part of an option. Where more than one reading is possible
there are no options, and `Choices.problems` says why.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

from vitos.core.instructions import is_instruction, without_instruction
from vitos.core.wording import normalize_answer

_IMAGE = "<image>"
_BOLD_LETTER = re.compile(r"(?:\*\*|__)[(\[]?[A-Za-z](?:\*\*|__|[.)\]:])")
_OPEN, _CLOSE = r"(?P<open>[(\[（【])?", r"(?P<mark>(?(open)[)\]）】][.:：]?|[.)\]:：、．）](?:[.:)](?=\s))?))"
_LABEL = rf"(?:(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE) )?{_OPEN}(?P<letter>[A-Za-z]){_CLOSE}"
_LINE_LABEL = re.compile(rf"[ \t]*(?:[-*•>] )?{_LABEL}(?P<text>.*)", re.DOTALL)
# In front of a letter inside a line: a blank, a mark that is no part of a word, or a Chinese or Japanese character.
_INLINE_LABEL = re.compile(rf"(?<![^\s(（,，;；|/?？!！。:：\[、\u3040-\u9fff]){_LABEL}(?=\s*\S)")

# Words that take a letter as their name, and what is written in front of an initial.
_NAME_WORDS = """
    stage grade type class group category phase level degree hepatitis vitamin influenza figure fig panel image img
    picture photo table part factor zone region area lesion point label arrow arrowhead structure segment letter box
    marker position row column series plate view slice scan section exhibit subfigure protein serotype serogroup
    subtype genotype variant immunoglobulin ig hemophilia haemophilia hemoglobin haemoglobin toxin enterotoxin
    amphotericin polymyxin coenzyme apolipoprotein cathepsin troponin cystatin interleukin streptococcus strep virus
    schedule appendix chapter item case patient subject site line wave pugh dukes weber stanford denis
"""
_NAMES = frozenset(_NAME_WORDS.split())
_SHORTENED = frozenset(("fig", "figs", "no", "mr", "mrs", "ms", "dr", "prof", "st", "vs", "pt"))
_WORD_BEFORE = re.compile(r"(?P<word>[^\W\d_]+)(?P<dot>\.?)[ \t]*[(（]?$")
# "J. A.", but not "A, B or C. A."
_INITIAL_BEFORE = re.compile(r"(?<![A-Za-z])(?<!or )(?<!and )(?<!, )(?<!/)[A-Z]\.[ \t]*$")
_SPECIES = re.compile(
    r"\s*(?:coli|difficile|aureus|pylori|albicans|perfringens|tetani|botulinum|fragilis|cereus|anthracis|burgdorferi|"
    r"trachomatis|pneumoniae|pneumophila|influenzae|falciparum|vivax|malariae|epidermidis|pyogenes|agalactiae|faecalis|"
    r"faecium|cepacia|baumannii|aeruginosa|mirabilis|jejuni|cholerae|gondii|histolytica|lamblia|neoformans|fumigatus|"
    r"meningitidis|gonorrhoeae|monocytogenes|diphtheriae|tuberculosis|leprae|elegans|melanogaster|granulosus)\b"
)
_NEAR = 40  # characters on either side of a letter that are looked at
_INITIAL, _GENUS = "an initial", "a genus"
_ASCII = str.maketrans("．：）】", ".:)]")
_JOINT = re.compile(r"(?:\s*[,，;；|/]\s*(?:(?:or|and)\s*)?|\s+(?:or|and)\s*)$")
_MARKUP_LINE = re.compile(r"[\W_]+|<[|/]?[\w|]+>")  # "---", "</question>"
_NO_TEXT = re.compile(r"[\s,;.:()/|]*(?:(?:or|and|to|vs|versus|through|than)\b[\s,;.:()/|]*)?$")


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of a question.

    Attributes:
        options: letter → text, from A on without gaps; empty if there are none, or more than one reading is possible.
        problems: what is doubtful about them, each as the end of a sentence about the question.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_choices(question: str) -> Choices:
    """Options written as `A. text`, `A) text`, `(A) text`, `A: text`, `a) text`, `**A.** text` and so on.

    A list whose letters do not read A, B, C … is no option list (the "C." of "vitamin C. deficiency" is none).
    """
    text = question.replace("**", "").replace("__", "") if _BOLD_LETTER.search(question) else question
    return _on_lines(text.splitlines()) or _inline(text) or Choices()


def option_lines(options: Sequence[str]) -> str:
    """Options with their letters, each on a line that begins with a line break; `parse_options` reads them back.

    Raises:
        ValueError: for more than 26 options.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options, but there are {len(ascii_uppercase)} letters")
    return "".join(f"\n{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def same_texts(options: Mapping[str, str]) -> Iterator[str]:
    """For each option with the text of an earlier one, the end of a sentence that says so."""
    seen: dict[str, str] = {}
    for letter, text in options.items():
        other = seen.setdefault(normalize_answer(text), letter)
        if other != letter:
            yield f"has the same text for the options {other} and {letter}"


def _next_letter(letters: Sequence[object], ahead: int = 0) -> str:
    return chr(ord("A") + len(letters) + ahead)


# --- one option per line --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """Lines of options from A on: for each option its own line, then those up to the next option's.

    `strays` are letters at the start of lines that are out of order.
    """

    first: int
    lower: bool
    lines: list[list[str]]
    strays: list[str] = field(default_factory=list)

    @property
    def letters(self) -> str:
        return ascii_uppercase[: len(self.lines)]


def _on_lines(lines: Sequence[str]) -> Choices | None:
    """Options that each begin a line; None if there are none."""
    starts = list(_blocks(lines))
    blocks = [block for block in starts if len(block.lines) > 1]
    if not blocks:
        return None
    if len(blocks) > 1:
        return Choices(problems=("has two lists of options",))
    (block,) = blocks
    before = [one for one in starts if one.first < block.first]
    if before and not any(line.strip() for line in before[-1].lines[0][1:]):
        return Choices(problems=("has the letter A twice",))
    for letter in block.strays:
        return Choices(problems=(f"has the letter {letter} {'twice' if letter in block.letters else 'out of order'}",))
    return _choices([_text_of(part) for part in block.lines[:-1]], block.lines[-1])


def _blocks(lines: Sequence[str]) -> Iterator[_Block]:
    block: _Block | None = None
    for index, line in enumerate(lines):
        label = _LINE_LABEL.match(line)
        letter = label["letter"] if label else ""
        lower = letter.islower()
        if label and letter in "Aa":
            if block:
                yield block
            block = _Block(index, lower, [[label["text"].strip()]])
        elif block and label and lower == block.lower and letter.upper() == _next_letter(block.lines):
            block.lines.append([label["text"].strip()])
        elif block:
            if label and lower == block.lower and label["text"].strip() and not is_instruction(line):
                block.strays.append(letter.upper())
            block.lines[-1].append(line.strip())
    if block:
        yield block


def _text_of(lines: Sequence[str]) -> str:
    """The text of an option in front of another one: everything but instructions and blank lines."""
    return "\n".join([line for line in lines[:1] if line] + [x for x in lines[1:] if x and not is_instruction(x)])


def _choices(texts: Sequence[str], last: Sequence[str]) -> Choices:
    """Options from the texts of all but the last one, and the lines of the last with what is behind it."""
    lines = [line for line in last if line != _IMAGE]
    if lines and not lines[0]:
        lines = lines[1:]  # there is nothing but the letter on its line
    text = without_instruction(lines[0]) if lines else ""
    behind = [line for line in lines[1:] if not line or not _MARKUP_LINE.fullmatch(line)]
    if (
        behind
        and behind[0]
        and not is_instruction(behind[0])
        and (behind[0][0].islower() or not behind[0][0].isalnum())
    ):
        text += "\n" + behind[0]
    options = dict(zip(ascii_uppercase, [*texts, text], strict=False))
    blank = [letter for letter, option in options.items() if not option.strip()]
    if blank:
        return Choices(problems=(f"has no text for the option {blank[0]}",))
    broken = [letter for letter, option in options.items() if "\n" in option]
    problems = [f"has a line break in the option {letter}" for letter in broken]
    if not broken and behind and behind[0] and not is_instruction(behind[0]):
        problems = [f"has a line behind the last option that may belong to it, {behind[0][:40]!r}"]
    return Choices(options, tuple(problems))


# --- options inside a line ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Label:
    """A letter with its marks that may begin an option; `name` is why it may be a name instead, "" if nothing is."""

    letter: str
    style: tuple[bool, str, bool]
    start: int
    end: int
    name: str

    @property
    def is_named(self) -> bool:
        return self.name not in ("", _INITIAL, _GENUS)


@dataclass(slots=True)
class _Run:
    """Labels from A on.

    Attributes:
        pending: the labels that would be next, but may be names.
        twice: letters that come again.
        end: where the next run begins, or the text ends.
    """

    labels: list[_Label]
    pending: list[_Label] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    end: int = 0


def _inline(text: str) -> Choices | None:
    """Options inside lines; None if there are none."""
    styles: dict[tuple[bool, str, bool], list[_Label]] = {}
    for label in _labels(text):
        styles.setdefault(label.style, []).append(label)
    runs = [run for labels in styles.values() for run in _runs(labels, len(text))]
    asked = min((place for mark in "?？" if (place := text.find(mark)) >= 0), default=len(text))
    lists = [run for run in runs if _is_list(text, run, asked < run.labels[0].start)]
    if len(lists) > 1:
        return Choices(problems=("has two lists of options",))
    return _read_run(text, lists[0]) if lists else None


def _labels(text: str) -> Iterator[_Label]:
    before: _Label | None = None
    for match in _INLINE_LABEL.finditer(text):
        mark = match["mark"][0].translate(_ASCII)
        style = (match["open"] is not None, mark, match["letter"].islower())
        name = _name(text, match, after=before)
        before = _Label(match["letter"].upper(), style, match.start(), match.end(), name)
        yield before


def _name(text: str, match: re.Match[str], after: _Label | None) -> str:
    """Why a letter may be a name: the word in front of it, `_INITIAL` or `_GENUS`; "" if it seems to be none."""
    near = text[max(0, match.start() - _NEAR) : match.start()]
    if word := _WORD_BEFORE.search(near):
        name = word["word"].casefold()
        if name in _SHORTENED or (not word["dot"] and (name in _NAMES or name.removesuffix("s") in _NAMES)):
            return name
    if match["mark"] != ".":
        return ""
    if _SPECIES.match(text[match.end() : match.end() + _NEAR]):
        return _GENUS
    behind_name = after is not None and after.is_named and text[after.end : match.start()].isspace()
    behind = _INITIAL_BEFORE.search(near) is not None and not behind_name  # "A. hepatitis A. B. hepatitis B."
    return _INITIAL if behind or re.match(r"[A-Z]\.", text[match.end() : match.end() + 2]) else ""


def _runs(labels: Sequence[_Label], end: int) -> Iterator[_Run]:
    """Labels in a row, A, B, C …; one that may be a name is taken only where the list continues with it."""
    run: _Run | None = None
    for label in labels:
        if label.letter == "A" and not label.name:
            if run:
                run.end = label.start
                yield run
            run = _Run([label])
        elif run is None:
            continue
        elif label.name:
            if label.letter == _next_letter(run.labels, len(run.pending)):
                run.pending.append(label)
        elif label.letter == _next_letter(run.labels):
            run.labels, run.pending = [*run.labels, label], []
        elif label.letter == _next_letter(run.labels, len(run.pending)):
            run.labels, run.pending = [*run.labels, *run.pending, label], []
        elif label.letter in {one.letter for one in run.labels}:
            run.twice.append(label.letter)
    if run:
        run.end = end
        yield run


def _is_list(text: str, run: _Run, asked: bool) -> bool:
    """Whether a run may be a list of options, unlike "(A) and (B)" or "Is (A) larger than (B)?".

    Args:
        asked: there is a question mark in front of it.
    """
    labels = _settled(text, run)[0]
    if len(labels) < 2:
        return False
    texts = _between(text, labels)
    last = text[labels[-1].end : run.end].lstrip().partition("\n")[0].rstrip()
    question = last.endswith("?") and not asked and not all(map(_JOINT.search, texts))
    return not question and not any(map(_NO_TEXT.match, [*texts, last]))


def _read_run(text: str, run: _Run) -> Choices:
    if run.twice:
        return Choices(problems=(f"has the letter {run.twice[0]} twice",))
    labels, doubt = _settled(text, run)
    texts = _between(text, labels)
    lines = [line.strip() for line in text[labels[-1].end :].lstrip().splitlines()]
    if all(map(_JOINT.search, texts)):
        texts = [_JOINT.sub("", option) for option in texts]
        lines[0] = without_instruction(lines[0]).rstrip(".?")
    choices = _choices(texts, lines)
    return Choices(choices.options, (*choices.problems, *doubt))


def _between(text: str, labels: Sequence[_Label]) -> list[str]:
    """The texts of all options but the last."""
    return [text[one.end : two.start].strip().rstrip("([{（").strip() for one, two in itertools.pairwise(labels)]


def _settled(text: str, run: _Run) -> tuple[list[_Label], list[str]]:
    """The labels of a run, and what is doubtful: the last ones may be names.

    A list has two options, so that B is one wherever it is.
    """
    labels, doubt = list(run.labels), []
    for label in run.pending:
        if len(labels) > 1:
            first = text[labels[-1].end : label.start].strip(" (").casefold() == label.name  # "B. hepatitis C."
            if first or not label.is_named:
                break
            rest = text[label.end : run.end].strip().rstrip(".").casefold()
            if not rest.endswith(label.name):  # as in "A. no grade B. low grade C. high grade"
                doubt = [f"has {label.letter} behind {label.name!r}, which may be a name"]
        labels.append(label)
    return labels, doubt
