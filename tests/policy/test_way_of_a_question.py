"""The calls of one question, traced: docs/architecture.md lists them, and none goes from a lower layer to a higher."""

import re
import sys
from pathlib import Path

import pytest

import vitos
from vitos.core.geometry import Box
from vitos.policy import branches
from vitos.policy.vlm import SparseVLM

SOURCE = Path(vitos.__file__).parent
PAGE = Path(__file__).parents[2] / "docs/architecture.md"
# From the highest layer to the lowest; files of one row may call each other.
LAYERS = [
    ("policy/vlm.py",),
    ("policy/run.py",),
    ("policy/plans/",),
    ("policy/prefixes.py",),
    ("policy/branches.py",),
    ("policy/types.py", "policy/spec.py"),
    ("engines/",),
    ("backbones/",),
    ("config/", "data/"),
    ("core/",),
]
# A function that is an argument: the parser reads four numbers as the family writes them.
HANDED_DOWN = {("core/response.py", "backbones/base.py", "Backbone.box_reader.<locals>.read")}


def layer(file):
    return next(number for number, places in enumerate(LAYERS) if file.startswith(places))


def traced(run):
    """All calls between functions of the package while `run` runs: (caller's file or None, file, function)."""
    calls = []

    def own(frame):
        while frame is not None and not frame.f_code.co_filename.startswith(f"{SOURCE}/"):
            frame = frame.f_back
        return frame

    def note(frame, event, argument):
        if event == "call" and own(frame) is frame:
            caller = own(frame.f_back)
            files = [f and Path(f.f_code.co_filename).relative_to(SOURCE).as_posix() for f in (caller, frame)]
            calls.append((*files, frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


@pytest.fixture(scope="module")
def vlm():
    return SparseVLM.from_pretrained("nano", device="cpu")


def documented():
    """(indentation, file, function) of each line of the page's list."""
    (block,) = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(len(a), b, c) for a, b, c in re.findall(r"^( *)([\w/]+\.py):([\w.]+)", block, re.MULTILINE)]


def test_the_documented_calls_are_made_in_their_order(vlm, phantom_records):
    record, found = phantom_records[0], []
    scan = vlm.encode(record.image_paths[0])
    calls = iter(traced(lambda: found.append(vlm.ask(scan, record.question))))
    assert found[0].boxes  # else nothing would be left out
    above = []
    for indentation, file, function in documented():
        above = [*above[: indentation // 2], file]
        caller = above[-2] if len(above) > 1 else None
        assert (caller, file, function) in calls, f"no call of {file}:{function} by {caller} here"  # goes on behind it


def upwards(calls):
    """The calls from a lower layer to a higher one."""
    return {call for call in calls if call[0] is not None and layer(call[0]) > layer(call[1])} - HANDED_DOWN


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "dense", "crop"])
@pytest.mark.parametrize("given", [{}, {"boxes": [Box(0.1, 0.2, 0.6, 0.7)]}], ids=["localized", "given"])
def test_no_module_is_entered_from_below(vlm, phantom_records, plan, given):
    if plan == "dense" and given:
        pytest.skip("plan dense takes no boxes")
    record = phantom_records[0]
    scan = vlm.encode(record.image_paths[0], plan=plan)
    for ask in (vlm.ask, lambda *args, **named: list(vlm.stream(*args, **named))):
        calls = traced(lambda ask=ask: ask(scan, record.question, plan=plan, **given))
        assert upwards(calls) == set()
        assert {file for _, file, _ in calls} >= {"policy/run.py", "policy/branches.py", "core/response.py"}


def test_a_call_from_below_is_found(vlm, phantom_records, monkeypatch):
    parse = branches.parse_reasoning
    monkeypatch.setattr(branches, "parse_reasoning", lambda *args: vlm.branches and parse(*args))
    record = phantom_records[0]
    scan = vlm.encode(record.image_paths[0])
    calls = traced(lambda: vlm.ask(scan, record.question))
    assert upwards(calls) == {("policy/branches.py", "policy/vlm.py", "SparseVLM.branches")}
