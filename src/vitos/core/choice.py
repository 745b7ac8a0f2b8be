"""Which option a text chooses: by its letter, by its letter with its text, or by its text.

    B     B.     (B)     B) cyst     B: cyst     **B**     \\boxed{B}     Answer: B     The answer is B.

are one answer, for every letter alike. Nothing is guessed. A letter with a text counts only if the text is that
option's: "B. nodule" where nodule is A, "B) cyst or C" and "B) not cyst" choose nothing. A sentence such as "the
answer is B" counts only at the end, if it is not hedged ("I think …", "if …, …", "… is probably B"), and if no other
letter was called the answer before. All of it takes linear time, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from vitos.core.wording import normalize_answer

# What is taken off before an answer is read, and off an option's text before the two are compared.
_MARKUP = re.compile(r"\*\*|__|`|\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|bf|rm)(?![A-Za-z])|\\[()\[\]]|[{}$]")
_BOXED = re.compile(r"\\boxed\s*+\{([^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+)\}")
_PAIRS = ("**", "__", '""', "''", "“”", "‘’", "«»")
_QUOTE = r"[*_\"'“”‘’]{0,3}"

_LETTER = (
    rf"{_QUOTE}(?:(?i:option|choice)\s++)?(?P<open>[(\[（])?(?P<letter>[A-Za-z])"
    r"(?(open)[)\]）]|(?P<close>[)\]）])?)[.:。．：、]?"
)
_ALONE = re.compile(rf"{_LETTER}{_QUOTE}[.!]?")
# With a text: only behind a mark or a dash, because "A nodule" may begin with an article.
_WITH_TEXT = re.compile(
    rf"{_LETTER}(?:(?<=[)\]）.:。．：、])(?P<blank>\s*+)|\s++(?P<dash>[-–—])\s++)(?P<text>\S.*)", re.DOTALL
)

# --- where the options' texts are not known -------------------------------------------------------------------------

# A second option inside the text: "… or B) cyst", "… B. cyst", "…, B", or nothing but "or B".
_OTHER_LETTER = re.compile(r"(?:^|[\s(,/&])([A-Z])(?:[):]|\.\s)|(?:^(?:or|and|[,/&])?|,)\s*+\(?([A-Z])\W*+\Z")
_HEDGED_TEXT = re.compile(
    r"\b(?:not|or|nor|neither|either|maybe|perhaps|possibly|probably|unsure|uncertain|wait|answer|instead|rather|unless|"
    r"might|could|but)\b|n['’]t\b|\bno\b\s*,|\?",
    re.IGNORECASE,
)

# --- sentences ------------------------------------------------------------------------------------------------------

_CUE = re.compile(
    r"(?:\b(?i:answer|option|choice)(?i:\s++(?:choice|option|letter))?(?i:\s++to\s++(?:the|this)\s++question)?"
    r"(?:(?i:\s++is)?\s*+[:：]\s*+|(?i:\s++is)\s++|[ \t]*+\n\s*+)|"
    r"答案(?:是|为|選|选)?\s*+[:：]?\s*+|故选\s*+[:：]?\s*+)"
)
_STATED = re.compile(r"(?:(?i:option|choice)\s++)?[(\[（]?([A-Z])(?![^\W_])")
_ENDS = ("\n", ". ", "! ", "? ", ".\t", "。", "！", "？")
# The clause of "the answer is": nothing but these words since the last mark or conclusion.
_CLAUSE = re.compile(
    r"(?:^|[,;:：，；—–-]|\b(?:so|thus|hence|therefore|consequently|and|but|then|means(?:\s+that)?|that\s+means))"
    r"(?:\s|[*_#>]|\b(?:the|my|our|this|final|correct|right|best|single|most|likely|probable|appropriate|suitable|accurate|"
    r"overall|in|conclusion|summary|finally|so|thus|hence|therefore|consequently|and|but|then)\b){0,60}+$",
    re.IGNORECASE,
)
_NEAR = 300  # characters in front of "the answer is" in which its clause must begin
_LABELLED = re.compile(r"\s*[(\[]?([A-Z])[)\].:]\s")
_LISTED = re.compile(r"[(\[]?A[)\].:][^\n]*\n[(\[]?B[)\].:]")  # options repeated in front of the answer
_MOST_LIKELY = re.compile(r"\bmost\s+(?:likely|probable)\b", re.IGNORECASE)
_INTRODUCED = re.compile(
    r"^(?:(?:so|therefore|thus|hence),?\s+)?(?:(?:the|my)\s+)?(?:final\s+|correct\s+)?answer(?:\s+is:?\s+|:\s*)",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(r"(?:[,;:—–]\s*(?:and\s+)?(?:so|thus|hence)|[;:—–]\s*therefore,?)\s+[^,;:]*$", re.IGNORECASE)
_DOUBT = re.compile(
    r"\b(?:not|no|never|nor|neither|none|cannot|unless|if|whether|may|might|could|would|should|maybe|perhaps|possibly|"
    r"probably|likely|doubt\w*|unsure|uncertain|unclear|unlikely|guess\w*|suppos\w*|assum\w*|hypothe\w*|wrong|incorrect|"
    r"false|mistak\w*|thinks?|thought|believe\w*|feel\w*|seem\w*|appear\w*|says?|said|claim\w*|argu\w*|wonder\w*|except|"
    r"otherwise|either|or|wait|actually|sorry|correction|imagine|pretend)\b|n['’]t\b",
    re.IGNORECASE,
)


def read_choice(content: str, options: Collection[str] | None) -> str | None:
    """The letter that a text states as its answer, or None; a text without a letter states none.

    Args:
        options: letters that may be chosen, or letter → text; None or empty (not known): any letter of A-Z.
    """
    bare = _undressed(content)
    boxes = list(_BOXED.finditer(content))
    boxed = {_lettered(_undressed(box[1]), options) for box in boxes}
    letter = _lettered(bare, options) or _stated(bare, options)
    if letter is None and boxes and not content[boxes[-1].end() :].strip(" \t\r\n*_.$)]\\"):
        head = _sentence(content[: boxes[-1].start()])
        letter = None if _is_hedged(head) else _lettered(_undressed(boxes[-1][1]), options)
    return letter if boxed <= {letter} else None


def text_of_one(content: str, options: Collection[str] | None) -> str | None:
    """The letter of the only option with exactly this text, runs of white space aside; case counts if it has to.

    None also if the text is another option's letter with its text: "C. difficile", where that of C is "difficile".
    """
    texts = options if isinstance(options, Mapping) else {}
    letter = _same_text(content, texts)
    match = _WITH_TEXT.fullmatch(content.strip()) if letter else None
    other = match["letter"].upper() if match else letter
    return None if match and other != letter and other in texts and _has_text(match, texts) else letter


def _same_text(content: str, texts: Mapping[str, str]) -> str | None:
    for form in (str, str.casefold):
        written = form(content).split()
        if same := [letter for letter, text in texts.items() if form(text).split() == written]:
            return same[0] if len(same) == 1 else None
    return None


def name_option(written: str, options: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text is the same as `written` after `normalize_answer`; None otherwise.

    "The answer is …" may be in front. A capital A may be a letter: in front of another option's text it chooses none.
    """
    bare = _INTRODUCED.sub("", _undressed(written))
    if not _comparable(bare, max(map(len, options.values()), default=0)):
        return None
    same = [letter for letter, text in options.items() if _alike(bare, _MARKUP.sub("", text))]
    if len(same) != 1:
        return None
    exact = text_of_one(bare, options)
    if _WITH_TEXT.fullmatch(bare) and exact != same[0]:
        return None  # a letter and a text that do not agree, or two readings
    return None if re.match(r"A\s", bare) and "A" in options and exact != same[0] != "A" else same[0]


# --- a letter, and a letter with its text ---------------------------------------------------------------------------


def _undressed(content: str) -> str:
    """Without Markdown, LaTeX and quotes around all of it."""
    bare = _MARKUP.sub("", content).strip()
    for _ in range(3):
        if len(bare) > 2 and bare[0] + bare[-1] in _PAIRS:
            bare = bare[1:-1].strip()
    return bare


def _is_option(letter: str, options: Collection[str] | None) -> bool:
    return not options or letter in options


def _lettered(bare: str, options: Collection[str] | None) -> str | None:
    """The letter of "B", "(B).", "B) cyst" and so on, if that is all of the text."""
    texts = options if isinstance(options, Mapping) else {}
    match = _ALONE.fullmatch(bare) or _WITH_TEXT.fullmatch(bare)
    if match is None:
        return None
    letter, text = match["letter"].upper(), match.groupdict().get("text")
    if not _is_option(letter, options):
        return None
    if text is not None and texts:
        return letter if _agrees(match, texts) else None
    if match["letter"].islower() and not (texts and (match["open"] or match["close"])):
        return None  # "a" is a word too
    if text is None:
        return letter
    return letter if match["blank"] and not _is_doubtful(text, letter, options) else None


def _agrees(match: re.Match[str], texts: Mapping[str, str]) -> bool:
    """Whether the text behind a letter is the text of this option, and the whole is not that of another one."""
    letter, text = match["letter"].upper(), match["text"]
    if text.rstrip(".") == letter and not match["dash"]:
        return True  # the letter again
    if match["dash"] and len(text) == 1:
        return False  # "A - B" may be both
    return _has_text(match, texts) and _same_text(match[0], texts) in (None, letter)


def _has_text(match: re.Match[str], texts: Mapping[str, str]) -> bool:
    """Whether the text behind a letter is that of this option."""
    text, option = match["text"], _MARKUP.sub("", texts[match["letter"].upper()])
    if text.split() == option.split():
        return True
    return _comparable(text, len(option)) and _alike(text, option)


def _alike(text: str, option: str) -> bool:
    """Whether two texts say the same; "cyst?" does not say "cyst"."""
    asked = [written.rstrip(" .!\"'”’").endswith(("?", "？")) for written in (text, option)]
    return asked[0] == asked[1] and normalize_answer(text) == normalize_answer(option)


def _comparable(text: str, length: int) -> bool:
    """Whether a text is short enough to be compared with one of this length: normalising takes a while."""
    return len(text) <= 4 * length + 200


def _is_doubtful(text: str, letter: str, options: Collection[str] | None) -> bool:
    """Whether a text of unknown meaning behind a letter may take it back, or name another one."""
    others = {other[1] or other[2] for other in _OTHER_LETTER.finditer(text)} - {letter}
    named = any(_is_option(other, options) for other in others)
    return named or _HEDGED_TEXT.search(text) is not None or _CUE.search(text) is not None


# --- a sentence at the end ------------------------------------------------------------------------------------------


def _stated(bare: str, options: Collection[str] | None) -> str | None:
    """The letter of "the answer is B" at the end of a text, if nothing speaks against it."""
    cues = list(_CUE.finditer(bare))
    found = ((cue, _lettered(bare[cue.end() :].strip(), options)) for cue in (*cues[-1:], *cues[:1]))
    cue, letter = next(((cue, letter) for cue, letter in found if letter), (None, None))
    if cue is None or letter is None:
        return None
    start = cue.start()
    sentence = _sentence(bare[:start])
    near = sentence if len(sentence) <= _NEAR else f"x {sentence[-_NEAR:]}"
    if not _CLAUSE.search(near) or _is_hedged(sentence):
        return None
    return letter if _other_statements(bare, cues, start, options) <= {letter} else None


def _other_statements(bare: str, cues: list[re.Match[str]], start: int, options: Collection[str] | None) -> set[str]:
    """Letters that are called the answer elsewhere: before, on the same line in front, on the first line."""
    stated = {found[1] for cue in cues if (found := _STATED.match(bare, cue.end()))}
    if found := _LABELLED.match(bare, bare.rfind("\n", 0, start) + 1):
        stated.add(found[1])  # "B. The answer is C"
    first, _, rest = bare.partition("\n")
    if (letter := _lettered(first.strip(), options)) and not _LISTED.match(f"{first}\n{rest.lstrip()[:9]}"):
        stated.add(letter)
    return stated


def _sentence(head: str) -> str:
    """The last sentence of a text, as far as it goes."""
    return head[max(head.rfind(end) + len(end) if end in head else 0 for end in _ENDS) :]


def _is_hedged(sentence: str) -> bool:
    """Whether what is in front of "the answer is" makes it doubtful; behind ", so" or the like only the conclusion."""
    if found := _CONCLUDES.search(sentence[-_NEAR:]):
        sentence = found[0]
    return _DOUBT.search(_MOST_LIKELY.sub("", sentence)) is not None
