"""Sentences of a question that say how to answer: "Answer with the option's letter from the given choices directly."

They are in front of the options, behind them and on the same line, in many words. They are found by what they are made
of, a request and what it is about, so that wordings that were never seen are found too. A request at the start of an
option ("D. Give oxygen") is the option.
"""

from __future__ import annotations

import re

# Repetitions are bounded, so that a text of any length takes linear time.
_POLITE = (
    r"(?:(?:please|kindly|now|then|first|finally|lastly|carefully|you (?:must|should|may|can|need to|are asked to)|"
    r"your task is to|make sure (?:to|that you)|be sure to|remember to|only|just|directly|simply|briefly|do not|don't|"
    r"never)[ ,:]{1,3}){0,4}"
)
_VERB = (
    r"(?:answer|choose|select|pick|respond|reply|return|output|give|provide|write|state|indicate|print|mark|enter|"
    r"identify|determine|decide|explain|justify|think|reason|include|add|use|enclose|put|place|wrap|format|end|conclude|"
    r"finish|generate|submit|say|respond|tick|circle|report|solve|read|look|consider|analy[sz]e|examine|study|base)"
)
# What a request about the answer names, and what the text of an option would hardly name.
_NAMED = (
    r"letters?|(?:correct|right|best|appropriate|suitable|correctly|single|final|likely) "
    r"(?:answer|option|choice|alternative|one)s?|"
    r"(?:given|provided|above|following|listed|available|answer|four|five|two) "
    r"(?:options|choices|answers|alternatives)|"
    r"(?:options|choices|alternatives|answers) (?:above|below|given|provided|listed)|"
    r"(?:from|consider|all|among|of) (?:among |all )?(?:the |these |those )?"
    r"(?:options|choices|alternatives|answers|list)|"
    r"(?:option|choice)(?:'|’)s|which (?:option|choice|answer|alternative)|(?:answer|choose|select|pick) one|"
    r"(?:one|an) (?:of the )?(?:option|choice)s?|(?:option|choice|answer) (?:only|directly|alone)|"
    r"(?:the|only|an) (?:option|choice)|single words?|one word|words? or phrases?|short phrase|<\w{1,12}>|\\?boxed|"
    r"step[- ]by[- ]step|the (?:above |following |given )?question|"
    r"your (?:final )?(?:task|answer|reasoning|choice|response|"
    r"explanation)|the (?:final )?answer|(?:no|any|an|without|further) explanations?|anything else|json"
)
_LISTED = r"[A-Z], ?[A-Z]\b|[A-Z] or [A-Z]|[A-Z]/[A-Z]|one\W{0,3}$"  # "A, B, C or D", "Select one."
_ALSO_NAMED = (
    rf"{_NAMED}|{_LISTED}|options?|choices?|alternatives?|answers?|answering|response|explanations?|explaining|reasoning|"
    r"directly|tags?|image|picture"
)
_COLON = r"[ \t]{0,3}[:：]"
_HEADED = (
    r"(?:(?:the|your|my|final|correct|best|right|expected) ){0,4}(?:answer|response|choice)"
    r"(?: (?:choice|option|letter|format|only)){0,2}"
)
_OTHER = (
    rf"let(?:(?:'|’)?s| us) (?:think|solve|work|reason)\b|think (?:step|carefully|about it|before)|{_HEADED}{_COLON}|"
    rf"{_HEADED} (?:should|must|is to|has to|needs to)\b"
)
_HEADER = (
    r"(?:assistant|response|output|solution|explanation|rationale|reasoning|hint|context|note|format|output format|"
    rf"answer format|instructions?|important|requirements?|user|human|system|question){_COLON}"
)
_CHINESE = r"请|答案|回答|只需|从(?:以上|下列|给定|上述|这些)|选择(?:正确|一个|最)"


def _request(named: str, within: int) -> str:
    return rf"{_POLITE}{_VERB}\b(?=[^\n]{{0,{within}}}?(?<!\w)(?:{named})(?!\w))"


_LINE = re.compile(
    rf"[\W_]{{0,8}}(?:\d{{1,2}}[.)] ?)?(?:{_request(_ALSO_NAMED, 200)}|{_OTHER}|{_POLITE}{_VERB}{_COLON}|{_HEADER}|"
    rf"(?:[qa]|rules?|answer){_COLON}|answer$|please\b|you (?:are|will|have)\b|"
    rf"{_CHINESE}|[^\n]{{0,200}}?(?<!\w)(?:{_NAMED})(?!\w))",
    re.IGNORECASE,
)
# Behind a mark any sentence that names the answer; behind a blank alone one that begins like a request.
_SENTENCE = rf"(?i:[^\n.!?]{{0,200}}?(?<![\w])(?:{_NAMED})(?!\w))"
_OPENING = (
    r"(?=(?:Based on|After|Before|Which|What is|If you|Without|Your|In your|As an?|No|I want|There is only|Only|Using|"
    r"According to|Letter|One|Single)\b)"
)
_BEGUN = rf"(?i:{_request(f'{_NAMED}|{_LISTED}', 200)}|{_OTHER}|{_HEADER})|{_OPENING}{_SENTENCE}|请|答案[:：是为]|回答"
_LONGEST = 2000  # characters of an option in which an instruction is looked for
_LEAD = r"[(\[*_#]{0,4}[ ]?"
_TAIL = re.compile(
    rf"(?<=[.;!?。；！？])[ \t]?{_LEAD}(?=[A-Z\u4e00-\u9fff])(?:{_BEGUN}|{_SENTENCE})|"
    rf"[ \t]{_LEAD}(?=[A-Z\u4e00-\u9fff])(?:{_BEGUN})|[ \t]?[(\[](?i:{_BEGUN}|{_VERB} one\b)"
)


def is_instruction(line: str) -> bool:
    """Whether a line behind the options asks for an answer, or heads one, instead of going on with an option.

    >>> is_instruction("Answer with the option's letter from the given choices directly.")
    True
    >>> is_instruction("of the left lung")
    False
    """
    return _LINE.match(line) is not None


def without_instruction(text: str) -> str:
    """The text of an option up to a sentence on the same line that asks for an answer.

    >>> without_instruction("mass. Answer with the option's letter.")
    'mass.'
    >>> without_instruction("Give oxygen. Reassure the patient.")
    'Give oxygen. Reassure the patient.'
    """
    for match in _TAIL.finditer(text[:_LONGEST]):
        if text[: match.start()].strip():
            return text[: match.start()].strip()
    return text.strip()
