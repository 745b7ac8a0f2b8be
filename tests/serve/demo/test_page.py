"""The events of the demo's page, called as the page calls them, and the page as a client sees it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.serve.dicom import write_dicom

gr = pytest.importorskip("gradio", reason="the demo extra is not installed")

from vitos.serve.demo import handlers as events  # noqa: E402
from vitos.serve.demo import inputs  # noqa: E402
from vitos.serve.demo import opening as opened_by  # noqa: E402
from vitos.serve.demo.handlers import Handlers  # noqa: E402
from vitos.serve.demo.opening import RESULTS, SHOWS, no_answers  # noqa: E402
from vitos.serve.demo.page import build, launch  # noqa: E402
from vitos.serve.demo.session import Session  # noqa: E402

SKIP = gr.skip()
SHOWN = ("preview", "facts", "heading", "slider", "axis", "slices", "centre", "width", "boxes", "asks", "asks_all")
QUESTION = "What?\nA. cyst\nB. mass"


@pytest.fixture
def handlers(vlm, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    return Handlers(vlm, folder)


@pytest.fixture
def session():
    return Session()


@pytest.fixture
def told(monkeypatch):
    """The messages that were shown."""
    messages = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: messages.append(text))
    return messages


@pytest.fixture
def dicom(tmp_path):
    """A CT file of two frames with values from -1000 to 2000 HU, window 40,400."""
    return write_dicom(tmp_path / "ct.dcm", frames=2)


def click(x, y):
    return SimpleNamespace(index=[x, y])


def opened(handlers, session, *files):
    """New values for what is shown when the files have been read."""
    *_, last = handlers.open(session, [str(file) for file in files])
    return SimpleNamespace(**dict(zip(SHOWN, last[:SHOWS], strict=True)))


def asked(handlers, session, begin=True, **given):
    call = {"centre": 0, "width": 1, "question": QUESTION, "plan": "two_pass", "budget": 0.0, "boxes": "",
            "seed": 0} | given  # fmt: skip
    if begin:
        handlers.begin(session, call["centre"], call["width"], call["question"])
    return handlers.ask(session, **call)


def pixels(file):
    return np.asarray(Image.open(file))


# --- events ---------------------------------------------------------------------------------------------------------


def test_two_clicks_make_a_box_that_is_drawn(handlers, session, examples, told):
    preview = opened(handlers, session, examples[0].image).preview
    assert session.opened.size == Image.open(preview).size == (384, 384)
    assert handlers.click(session, "", click(288, 96)) == (SKIP, SKIP)
    assert session.opened.corner == (0.75, 0.25)
    assert tuple(pixels(handlers.draw(session, 0, 1, ""))[96, 288]) == (230, 159, 0)
    boxes, drawn = handlers.click(session, "", click(96, 192))
    assert (session.opened.corner, boxes, drawn) == (None, "0.25, 0.25, 0.75, 0.5", 1)
    box = pixels(handlers.draw(session, 0, 1, boxes))
    assert (box[96, 96:288] == (230, 159, 0)).all()
    assert (box[97:190, 110:280] == pixels(preview)[97:190, 110:280]).mean() > 0.95
    handlers.click(session, boxes, click(0, 0))
    assert handlers.click(session, boxes, click(0, 100)) == (SKIP, SKIP)
    assert "must differ" in told[0]
    assert (handlers.clear(session), session.opened.corner) == ("", None)


def test_ask_shows_three_answers_and_the_boxes(handlers, session, vlm, examples):
    example = examples[4]
    opened(handlers, session, example.image)
    out = asked(handlers, session, question=example.question)
    alone = vlm.ask(vlm.encode(example.image), example.question)
    assert handlers.take(session) == inputs.format_boxes(alone.boxes)
    assert f"{alone.kept.count} of 64" in out[1]
    assert all(Image.open(update["value"]).size == (384, 384) for update in out[3:6])
    assert out[6].count("<tr>") == 4
    boxed = asked(handlers, session, question=example.question, boxes="0,0,0.25,0.25")
    assert "4 of 64" in boxed[1]
    assert "4 of 64" in boxed[2]
    handlers.begin(session, 0, 1, example.question)
    *_, table, thoughts, cards, link = handlers.ask_all(session, 0, 1, example.question, 0.0, "")
    assert table.count("<tr>") == thoughts.count("<dt>") + 1 == cards.count("<figure>") + 1 == 6
    assert "plan=" not in link


def test_what_is_wrong_is_told_in_one_message_and_changes_nothing(handlers, session, examples, told):
    """An error that is raised would mark each of the components with a badge."""
    assert set(map(str, asked(handlers, session))) == {str(SKIP)}
    assert set(map(str, handlers.ask_all(session, 0, 1, QUESTION, 0.0, ""))) == {str(SKIP)}
    assert told == ["Choose an example or a file first."] * 2
    opened(handlers, session, examples[0].image)
    for call, words in (
        ({"question": " "}, "Write a question"),
        ({"boxes": "0, 0, 2, 2"}, "Box 1 does not lie in the image"),
        ({"boxes": "left lung"}, "Box 1 is not four numbers"),
        ({"plan": "crop", "budget": 0.5}, "leave out the budget"),
    ):
        told.clear()
        assert asked(handlers, session, **call) == (SKIP,) * RESULTS
        assert len(told) == 1
        assert words in told[0]


def test_files_that_cannot_be_used(handlers, session, tmp_path, told):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50))
    for name in ("a.png", "b.dcm"):
        shown = opened(handlers, session, tmp_path / name)
        assert session.opened is shown.preview is None
        assert shown.facts.startswith(f"{name}: ")
        assert str(tmp_path) not in shown.facts
    opened(handlers, session, tmp_path / "gone.png")
    assert "choose it again" in told[-1]
    assert len(told) == 3
    shown = opened(handlers, session)
    assert (shown.preview, shown.facts) == (None, "")
    assert handlers.draw(session, 0, 1, "") == SKIP


def test_frames_and_windows_of_dicom(handlers, session, dicom, told):
    shown = opened(handlers, session, dicom)
    assert (shown.slider["visible"], shown.slider["maximum"], shown.slider["value"]) == (True, 2, 2)
    assert "frame 2, window 40,400 (file)" in shown.facts
    centre, width, preview = shown.centre, shown.width, shown.preview
    assert (centre["visible"], centre["value"], centre["minimum"], centre["maximum"]) == (True, 40, -960, 1040)
    assert (width["value"], width["minimum"], width["maximum"]) == (400, 0, 2000)
    same, other = (pixels(handlers.draw(session, *window, "")) for window in ((40, 400), (1000, 1800)))
    np.testing.assert_array_equal(same, pixels(preview))
    expected, _ = inputs.open_image(f"{dicom}#frame=2&window=1000,1800")
    small = Image.fromarray(other).resize((64, 64), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(expected))
    # Sliders that still hold the values of the image before, or none, must not be an error.
    assert str(session.opened.name(9000, 0.5)).endswith("#frame=2&window=1040,1")
    assert str(session.opened.name(9000, 0)).endswith("#frame=2")  # the width slider has not been set yet
    linked = replace(session.opened, linked=(30.0, 300.0))
    assert str(linked.name(0, 0)).endswith("#frame=2&window=30,300")
    assert str(session.opened.name(None, None)).endswith("#frame=2")
    first = asked(handlers, session, centre=40, width=400, boxes="0,0,0.5,0.5")
    second = asked(handlers, session, centre=1000, width=1800, boxes="0,0,0.5,0.5")
    assert (pixels(first[4]["value"]) != pixels(second[4]["value"])).any()


# --- what belongs to an earlier picture -----------------------------------------------------------------------------


def test_opening_removes_everything_of_the_picture_before(handlers, session, examples):
    opened(handlers, session, examples[4].image)
    asked(handlers, session, question=examples[4].question)
    assert handlers.take(session)
    for event in (
        handlers.open(session, str(examples[1].image)),
        handlers.open_axis(session, "1"),
        handlers.open(session, None),
    ):
        first = next(event)  # before the file is read
        assert first[0] is None
        assert first[8] == ""
        assert first[SHOWS:] == no_answers()
        assert session.opened is None
        assert handlers.take(session) == ""
        list(event)
    assert all(update["value"] is None for update in no_answers()[3:6])
    first, _ = handlers.open_example(session, examples[1])
    assert first[:2] == (None, examples[1].question)
    assert first[2 + SHOWS :] == no_answers()


@pytest.mark.parametrize("ask_all", [False, True])
@pytest.mark.parametrize("what", ["file", "same file", "frame", "window", "question", "no file", "nothing"])
def test_an_answer_about_something_else_is_never_shown(handlers, session, dicom, examples, monkeypatch, what, ask_all):
    """The change comes while the answer is computed; and, without `begin`, before that."""
    changes = {
        "file": lambda: list(handlers.open(session, str(examples[0].image))),
        "same file": lambda: list(handlers.open(session, str(dicom))),
        "frame": lambda: handlers.change(
            session, *([40, 400] + [QUESTION] * bool(handlers.show(session, 1, 40, 400, "")))
        ),
        "window": lambda: handlers.change(session, 50, 500, QUESTION),
        "question": lambda: handlers.change(session, 40, 400, "Which?\nA. cyst\nB. mass"),
        "no file": lambda: list(handlers.open(session, None)),
        "nothing": lambda: handlers.change(session, 40, 400, QUESTION),
    }
    name = "compare_plans" if ask_all else "compare"
    real = getattr(events, name)

    def meanwhile(*args, **options):
        found = real(*args, **options)
        changes[what]()
        return found

    opened(handlers, session, dicom)
    handlers.begin(session, 40, 400, QUESTION)
    if ask_all:
        ask = lambda: handlers.ask_all(session, 40, 400, QUESTION, 0.0, "")  # noqa: E731
    else:
        ask = lambda: asked(handlers, session, begin=False, centre=40, width=400)  # noqa: E731
    monkeypatch.setattr(events, name, meanwhile)
    before = len(list(handlers.folder.path.glob("*")))
    out = ask()
    if what == "nothing":
        assert out[7].startswith("<dl")
        return
    assert set(map(str, out)) == {str(SKIP)}
    assert handlers.take(session) == ""
    assert len(list(handlers.folder.path.glob("*"))) - before <= 1  # only the preview of a picture that was opened
    monkeypatch.setattr(events, name, lambda *_, **__: pytest.fail("the model was asked"))
    if what != "no file":
        assert set(map(str, ask())) == {str(SKIP)}


def test_a_file_that_is_read_slowly_does_not_replace_a_later_one(handlers, session, examples):
    slow = handlers.open(session, str(examples[0].image))
    next(slow)
    later = opened(handlers, session, examples[1].image)
    assert next(slow) == (SKIP,) * (SHOWS + RESULTS)
    assert session.opened.stack.paths == examples[1].images
    assert [str(file) for file in handlers.folder.path.iterdir()] == [later.preview]


def test_a_preview_of_an_earlier_picture_is_not_shown(handlers, session, examples, monkeypatch):
    opened(handlers, session, examples[0].image)
    real = opened_by.open_image

    def meanwhile(name):
        monkeypatch.setattr(opened_by, "open_image", real)
        opened(handlers, session, examples[1].image)
        return real(name)

    monkeypatch.setattr(opened_by, "open_image", meanwhile)
    assert handlers.draw(session, 0, 1, "") == SKIP


def test_a_changed_question_removes_the_answers_an_unchanged_one_does_not(handlers, session, examples):
    opened(handlers, session, examples[0].image)
    asked(handlers, session)
    assert handlers.change(session, 0, 1, QUESTION) == (SKIP,) * RESULTS
    assert handlers.change(session, 0, 1, QUESTION + " ") == no_answers()
    assert handlers.take(session) == ""


def test_each_preview_is_a_file_of_its_own_that_is_complete_when_it_appears(handlers, session, examples):
    """Many clicks at once, while the folder is read: no file is ever half written or written twice."""
    from concurrent.futures import ThreadPoolExecutor

    opened(handlers, session, examples[0].image)
    with ThreadPoolExecutor(4) as pool:
        drawing = [pool.submit(handlers.draw, session, 0, 1, "0,0,0.5,0.5") for _ in range(60)]
        while not all(job.done() for job in drawing):
            for file in handlers.folder.path.glob("*.png"):
                Image.open(file).load()
    names = [job.result() for job in drawing]
    assert len(set(names)) == 60
    assert {Image.open(name).size for name in names} == {(384, 384)}
    assert not list(handlers.folder.path.glob("*.part"))


def test_an_upload_keeps_no_name_on_the_disk_but_in_messages(handlers, session, dicom, told):
    upload = handlers.folder.path / "0a1b" / "Jane.Doe#1950.dcm"
    upload.parent.mkdir()
    upload.write_bytes(dicom.read_bytes()[:400])
    opened(handlers, session, upload)
    assert told[0].startswith("Jane.Doe#1950.dcm#frame=2: a DICOM")
    list(handlers.open_axis(session, 1))
    assert told[1] == told[0]
    names = [file.name for file in handlers.folder.path.rglob("*")]
    assert len(names) == 1
    assert not [name for name in names if "Doe" in name or "0a1b" in name]
    assert inputs.file_ending(handlers.folder.path / "Doe.Jane") == ""
    assert inputs.file_ending(handlers.folder.path / "Doe.Jane.NII.GZ") == ".nii.gz"


def test_pictures_are_deleted_after_an_hour(handlers, session, examples):
    import os
    import time

    old = opened(handlers, session, examples[0].image).preview
    os.utime(old, (time.time() - 3700,) * 2)
    recent = handlers.draw(session, 0, 1, "")
    handlers.draw(session, 0, 1, "")
    assert not os.path.exists(old)
    assert os.path.exists(recent)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_no_public_api_and_sends_no_analytics(vlm, examples, tmp_path):
    page = build(vlm, examples, tmp_path)
    assert page.analytics_enabled is False
    assert [f.api_visibility for f in page.fns.values()] == ["private"] * len(page.fns)
    assert {"two_pass", "gather", "coarse", "crop"} == {v for _, v in _by_id(page, "plan").choices}
    assert _by_id(page, "boxes").info


def _by_id(page, name):
    return next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == name)


def test_the_served_page_names_no_other_host(vlm, tmp_path):
    import httpx

    page, address = launch(vlm, tmp_path, port=None, block=False)
    try:
        config = httpx.get(f"{address}config").json()
        theme = httpx.get(f"{address}theme.css").text
        assert config["analytics_enabled"] is False
        assert config["run_history"] is False
        assert config["stylesheets"] == []
        assert "https://" not in theme
        assert page.share_url is None
        with pytest.raises(OSError, match="choose another with --port"):
            launch(vlm, tmp_path, port=page.server_port)
    finally:
        page.close()


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    import sys

    from typer.testing import CliRunner

    from vitos.cli.main import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("vitos.serve.demo.page", "vitos.serve.demo.handlers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = CliRunner().invoke(app, ["demo"])
    assert "pip install 'vitos[demo]'" in str(found.exception)


def test_a_wrong_name_is_said_before_gradio_is_imported(monkeypatch):
    import sys

    from typer.testing import CliRunner

    from vitos.cli.main import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    found = CliRunner().invoke(app, ["demo", "./no-such-model"])
    assert isinstance(found.exception, FileNotFoundError)
    assert "there is no such folder" in str(found.exception)


def test_the_notice_is_written_once_for_the_demo_and_the_command_line(vlm, examples, tmp_path):
    from pathlib import Path

    import vitos
    from vitos.serve import NOTICE

    assert any(NOTICE in str(getattr(block, "value", "")) for block in build(vlm, examples, tmp_path).blocks.values())
    root = Path(vitos.__file__).parent
    for file in (root / "cli" / "main.py", *(root / "serve" / "demo").glob("*.py")):
        assert NOTICE not in file.read_text(encoding="utf-8")


def test_nothing_of_the_page_is_wider_than_a_phone():
    """Minimum widths of the layout, and widths of the style: a screen of 390 pixels has 374 inside its margins."""
    import re
    from pathlib import Path

    from vitos.serve.demo import page

    here = Path(page.__file__)
    widths = [int(n) for n in re.findall(r"min_width=(\d+)", here.read_text(encoding="utf-8"))]
    style = here.with_name("demo.css").read_text(encoding="utf-8")
    widths += [int(n) for n in re.findall(r"[ ;{](?:min-)?width: (\d+)px", style)]
    assert len(widths) > 5
    assert max(widths) <= 374
