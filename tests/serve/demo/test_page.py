"""The events of the demo's page, called as the page calls them, and the page as a client sees it."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.serve.dicom import write_dicom

gr = pytest.importorskip("gradio", reason="the demo extra is not installed")

from vitos.serve.demo import inputs  # noqa: E402
from vitos.serve.demo.handlers import Handlers  # noqa: E402
from vitos.serve.demo.page import build, launch  # noqa: E402


@pytest.fixture
def handlers(vlm):
    return Handlers(vlm)


@pytest.fixture
def dicom(tmp_path):
    """A CT file of two frames with values from -1000 to 2000 HU, window 40,400."""
    return write_dicom(tmp_path / "ct.dcm", frames=2)


def click(x, y):
    return SimpleNamespace(index=[x, y])


def asked(handlers, opened, **given_):
    call = {"centre": 0, "width": 1, "question": "What?\nA. cyst\nB. mass", "plan": "two_pass", "budget": 0.0,
            "boxes": "", "seed": 0}  # fmt: skip
    return handlers.ask(opened, **call | given_)


# --- events ---------------------------------------------------------------------------------------------------------


def test_two_clicks_make_a_box_that_is_drawn(handlers, examples):
    opened, preview, *_ = handlers.open(str(examples[0].image))
    assert opened.size == preview.size == (384, 384)
    opened, *others = handlers.click(opened, "", 0, click(288, 96))
    assert opened.corner == (0.75, 0.25)
    assert others == [gr.skip(), gr.skip()]
    cross = handlers.draw(opened, 0, 1, "")
    assert cross.getpixel((288, 96)) == (230, 159, 0)
    opened, boxes, drawn = handlers.click(opened, "", 0, click(96, 192))
    assert (opened.corner, boxes, drawn) == (None, "0.25, 0.25, 0.75, 0.5", 1)
    box = np.asarray(handlers.draw(opened, 0, 1, boxes))
    assert (box[96, 96:288] == (230, 159, 0)).all()
    assert (box[97:190, 110:280] == np.asarray(preview)[97:190, 110:280]).mean() > 0.95
    opened, *_ = handlers.click(opened, boxes, drawn, click(0, 0))
    with pytest.raises(gr.Error, match="must differ"):
        handlers.click(opened, boxes, drawn, click(0, 100))
    opened, boxes = handlers.clear(opened)
    assert (opened.corner, boxes) == (None, "")


def test_ask_shows_three_answers_and_the_boxes(handlers, vlm, examples):
    example = examples[4]
    opened = handlers.open(str(example.image))[0]
    out = asked(handlers, opened, question=example.question)
    alone = vlm.ask(vlm.encode(example.image), example.question)
    assert out[-1] == inputs.format_boxes(alone.boxes)
    assert f"{alone.kept.count} of 64" in out[1]
    assert all(update["value"].size == (384, 384) for update in out[3:6])
    assert out[6].count("<tr>") == 4
    boxed = asked(handlers, opened, question=example.question, boxes="0,0,0.25,0.25")
    assert "4 of 64" in boxed[1]
    assert "4 of 64" in boxed[2]
    table, thoughts = handlers.ask_all(opened, 0, 1, example.question, 0.0, "")
    assert table.count("<tr>") == thoughts.count("<dt>") + 1 == 6


def test_what_is_wrong_is_told_without_a_traceback(handlers, examples):
    opened = handlers.open(str(examples[0].image))[0]
    for call, words in (
        ({"question": " "}, "Write a question"),
        ({"boxes": "0, 0, 2, 2"}, "Box 1 does not lie in the image"),
        ({"boxes": "left lung"}, "Box 1 is not four numbers"),
        ({"plan": "crop", "budget": 0.5}, "leave out the budget"),
    ):
        with pytest.raises(gr.Error, match=words) as caught:
            asked(handlers, opened, **call)
        assert caught.value.print_exception is False
    with pytest.raises(gr.Error, match="Choose an example"):
        asked(handlers, None)


def test_files_that_cannot_be_used(handlers, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: told.append(text))
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50))
    for name in ("a.png", "b.dcm"):
        opened, preview, facts, part, *_ = handlers.open(str(tmp_path / name))
        assert opened is preview is None
        assert facts.startswith(f"{name}: ")
        assert str(tmp_path) not in facts
        assert part["visible"] is (name == "b.dcm")
    assert len(told) == 2
    assert handlers.open(None)[:3] == (None, None, "")
    assert handlers.draw(None, 0, 1, "") is None


def test_frames_and_windows_of_dicom(handlers, dicom, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: told.append(text))
    opened, *_, part, centre, _, _ = handlers.open(str(dicom))
    assert opened is None
    assert "2 frames" in told[0]
    assert part["visible"]
    opened, preview, facts, part, centre, width, _ = handlers.open(str(dicom), "frame=2")
    assert "frame 2, window 40,400 (file)" in facts
    assert (centre["visible"], centre["value"], centre["minimum"], centre["maximum"]) == (True, 40, -960, 1040)
    assert (width["value"], width["minimum"], width["maximum"]) == (400, 0, 2000)
    same, other = handlers.draw(opened, 40, 400, ""), handlers.draw(opened, 1000, 1800, "")
    np.testing.assert_array_equal(np.asarray(same), np.asarray(preview))
    expected, _ = inputs.open_image(f"{dicom}#frame=2&window=1000,1800")
    np.testing.assert_array_equal(np.asarray(other.resize((64, 64), Image.Resampling.NEAREST)), np.asarray(expected))
    # Sliders that still hold the values of the image before, or none, must not be an error.
    assert str(opened.name(9000, 0)).endswith("#frame=2&window=1040,1")
    assert str(opened.name(None, None)).endswith("#frame=2")
    first = asked(handlers, opened, centre=40, width=400, boxes="0,0,0.5,0.5")
    second = asked(handlers, opened, centre=1000, width=1800, boxes="0,0,0.5,0.5")
    assert (np.asarray(first[4]["value"]) != np.asarray(second[4]["value"])).any()


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_no_public_api_and_sends_no_analytics(vlm, examples):
    page = build(vlm, examples)
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
