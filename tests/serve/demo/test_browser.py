"""The demo in headless Chromium, by mouse and by keyboard.

`VITOS_DEMO_SCREENSHOT=docs/assets/demo.jpg` also writes the picture that docs/demo.md shows.
"""

import os
import re
from pathlib import Path

import pytest
from tests.serve.dicom import write_dicom

pytest.importorskip("gradio", reason="the demo extra is not installed")
browsers = pytest.importorskip("tests.browser")

pytestmark = [pytest.mark.slow, browsers.needs_chromium]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from vitos.policy.vlm import SparseVLM
    from vitos.serve.demo.page import launch

    page, address = launch(
        SparseVLM.from_pretrained("nano", device="cpu"), tmp_path_factory.mktemp("demo"), port=None, block=False
    )
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as chromium:
        yield chromium


@pytest.fixture
def page(browser, address):
    """A freshly loaded page; afterwards it is checked that nothing was fetched from another host."""
    page = browser.new_page(viewport={"width": 1200, "height": 980})
    page.set_default_timeout(60_000)
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(address)
    page.wait_for_selector(".example")
    yield page
    page.close()
    assert [url for url in fetched if not url.startswith((address, "data:", "blob:"))] == []


def kept(page):
    """Numbers of tokens kept in the table: dense, sparse, random."""
    page.wait_for_selector("#results td.answer")
    return [int(n) for n in re.findall(r"(\d+) of 64 \(", page.locator("#results").inner_text())]


def wait_for(page, script):
    page.wait_for_function(script)


def wait_for_pictures(page, *names):
    """Until each is decoded and has a size on the page."""
    there = "name => (i => i?.complete && i.naturalWidth > 0 && i.width > 0)(document.querySelector(`#${name} img`))"
    wait_for(page, f"{list(names)}.every({there})")


def boxes(page):
    return page.locator("#boxes textarea").input_value().splitlines()


def point(page, x, y):
    """Position on the screen of a point of the previewed image, given in fractions."""
    page.locator("#preview img").scroll_into_view_if_needed()
    area = page.locator("#preview img").bounding_box()
    return area["x"] + x * area["width"], area["y"] + y * area["height"]


def test_an_example_is_answered_and_a_drawn_box_changes_it(page):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    assert page.locator("#question textarea").input_value().startswith("Which is larger")
    page.locator("#ask").click()
    dense, sparse, random = kept(page)
    assert dense == 64 > sparse == random
    overlays = [page.locator(f"#{name} img") for name in ("dense", "sparse", "random")]
    wait_for_pictures(page, "dense", "sparse", "random")
    assert all(overlay.evaluate("i => i.naturalWidth") == 384 for overlay in overlays)
    assert "tokens" in overlays[1].get_attribute("alt")
    before = overlays[1].get_attribute("src")
    if target := os.environ.get("VITOS_DEMO_SCREENSHOT"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(target))

    page.mouse.click(*point(page, 0.02, 0.02))
    page.wait_for_timeout(800)
    assert boxes(page) == []
    page.mouse.click(*point(page, 0.2, 0.2))
    wait_for(page, "document.querySelector('#results').innerText.includes('Your boxes were used')")
    (box,) = boxes(page)
    assert [float(v) for v in box.split(",")] == pytest.approx([0.02, 0.02, 0.2, 0.2], abs=0.01)
    assert kept(page) == [64, 4, 4]
    wait_for(page, f"document.querySelector('#sparse img').src != {before!r}")


def test_dragging_draws_a_box(page):
    page.locator(".example").nth(0).click()
    page.wait_for_selector("#preview img")
    page.mouse.move(*point(page, 0.05, 0.55))
    page.mouse.down()
    page.mouse.move(*point(page, 0.2, 0.7))
    page.mouse.move(*point(page, 0.45, 0.95))
    assert page.locator(".band").count() == 1
    page.mouse.up()
    assert kept(page) == [64, 16, 16]  # answered without a press of the button
    (box,) = boxes(page)
    assert [float(v) for v in box.split(",")] == pytest.approx([0.05, 0.55, 0.45, 0.95], abs=0.01)
    page.locator("#clear").click()
    wait_for(page, "document.querySelector('#boxes textarea').value === ''")


def drag(page, start, end, **options):
    page.mouse.move(*point(page, *start))
    page.mouse.down(**options)
    page.mouse.move(*point(page, *((a + b) / 2 for a, b in zip(start, end, strict=True))))
    page.mouse.move(*point(page, *end))
    page.mouse.up(**options)


def box(page, number=0):
    return [float(v) for v in boxes(page)[number].split(",")]


def test_a_box_is_moved_resized_and_deleted(page):
    page.locator(".example").nth(0).click()
    page.wait_for_selector("#preview img")
    drag(page, (0.1, 0.1), (0.4, 0.4))
    kept(page)
    assert box(page) == pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.015)
    drag(page, (0.25, 0.25), (0.55, 0.35))  # from its middle: moved
    wait_for(page, "parseFloat(document.querySelector('#boxes textarea').value) > 0.3")
    assert box(page) == pytest.approx([0.4, 0.2, 0.7, 0.5], abs=0.02)
    assert len(boxes(page)) == 1
    drag(page, (0.7, 0.5), (0.9, 0.9))  # from its corner: resized
    wait_for(page, "parseFloat(document.querySelector('#boxes textarea').value.split(',')[3]) > 0.85")
    assert box(page) == pytest.approx([0.4, 0.2, 0.9, 0.9], abs=0.03)
    page.locator("#results").get_by_text("Your boxes were used").wait_for()
    page.mouse.dblclick(*point(page, 0.65, 0.55))
    wait_for(page, "document.querySelector('#boxes textarea').value === ''")


def test_the_budget_moves_the_tokens_before_anything_is_asked(page):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#ask").click()
    kept(page)
    answered = page.locator("#results").inner_text()
    before = page.locator("#sparse img").get_attribute("src")
    page.locator("#budget input[type=range]").focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    page.locator("#sparse-heading").get_by_text("32 of 64 tokens").wait_for()
    page.locator("#sparse-heading").get_by_text("not asked yet").wait_for()
    assert page.locator("#sparse img").get_attribute("src") != before
    assert page.locator("#results").inner_text() == answered


def test_all_pictures_zoom_and_move_together(page):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#ask").click()
    kept(page)
    names = ["preview", "sparse", "dense", "random"]
    wait_for_pictures(page, *names)
    sizes = f"{names}.map(name => document.querySelector(`#${{name}} img`).getBoundingClientRect())"
    before = page.evaluate(sizes)
    page.mouse.move(*point(page, 0.5, 0.5))
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    after = page.evaluate(sizes)
    assert [a["width"] / b["width"] for a, b in zip(after, before, strict=True)] == pytest.approx(
        [2.718] * 4, abs=0.05
    )
    area = page.locator("#preview").bounding_box()
    middle = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    page.keyboard.down("Shift")
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 40, middle[1])
    page.mouse.up()
    page.keyboard.up("Shift")
    moved = page.evaluate(sizes)
    assert [m["x"] - a["x"] for m, a in zip(moved, after, strict=True)] == pytest.approx([-40] * 4, abs=1)
    assert boxes(page) == []
    page.locator(".example").nth(1).click()  # another picture begins unzoomed
    assert page.evaluate("document.documentElement.style.getPropertyValue('--zoom')") == "none"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_the_screen(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#ask").click()
    kept(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_answers_of_an_earlier_picture_never_stay(page):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#ask").click()
    kept(page)
    for number in (1, 2):
        page.locator("#ask").click()
        page.locator(".example").nth(number).click()  # while the answer is computed
        title = page.locator(".example").nth(number).inner_text()[:20]
        wait_for(page, f"document.querySelector('#question textarea').value.startsWith({title!r})")
        shown = "document.querySelectorAll('#results td.answer, #dense img, #sparse img, #random img').length"
        wait_for(page, f"{shown} === 0")
        for _ in range(20):  # long enough for the answer that was being computed
            page.wait_for_timeout(100)
            assert page.evaluate(shown) == 0


def test_the_preview_is_never_broken(page):
    for click in range(24):
        page.locator(".example").nth(click % 5).click(no_wait_after=True)
        if click % 6 == 5:
            wait_for(page, "(i => i?.complete && i.naturalWidth === 384)(document.querySelector('#preview img'))")


def test_by_keyboard_alone(page):
    page.locator(".example").nth(3).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#preview img")
    page.locator("#boxes textarea").focus()
    page.keyboard.type("0, 0, 0.5, 0.5")
    page.keyboard.press("Shift+Enter")
    assert kept(page) == [64, 16, 16]
    focused = page.locator("#boxes textarea").evaluate("e => getComputedStyle(e).outlineStyle")
    assert focused == "solid"


def ask(page):
    page.locator("#ask").click()
    kept(page)


def pixels_of(page, name):
    """The pixels of a picture as the browser shows them."""
    return page.evaluate(
        """async (name) => {
          const image = document.querySelector(`#${name} img`);
          await image.decode();
          const { naturalWidth: width, naturalHeight: height } = image;
          const canvas = Object.assign(document.createElement("canvas"), { width, height });
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.toDataURL();
        }""",
        name,
    )


def test_a_link_shows_the_same_pictures_and_answers(browser, page, address):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#boxes textarea").fill("0, 0, 0.5, 0.25\n0.5, 0.5, 0.9, 0.9")
    page.locator("#budget input[type=number]").fill("0.25")
    page.locator("#seed input").fill("3")
    page.locator("#draw input").nth(2).check()
    page.locator("#question textarea").fill("Which is larger?\nA. the cyst\nB. the mass & more")
    ask(page)
    page.locator("#link").wait_for()
    wait_for(page, "window.location.search === document.querySelector('#link').getAttribute('href')")
    names = ("preview", "dense", "sparse", "random")
    before, answers = [pixels_of(page, name) for name in names], page.locator("#results td.answer").all_inner_texts()
    other = browser.new_page(viewport={"width": 1200, "height": 980})
    other.set_default_timeout(60_000)
    other.goto(page.url)
    assert kept(other) == kept(page) == [64, 16, 16]
    assert other.locator("#results td.answer").all_inner_texts() == answers
    assert [pixels_of(other, name) for name in names] == before
    assert other.locator("#question textarea").input_value().endswith("B. the mass & more")
    assert (other.locator("#seed input").input_value(), boxes(other)) == ("3", boxes(page))
    other.goto(f"{address}?image=0123456789abcdef&question=What%3F&model=nano")
    other.get_by_text("Choose the image of this link").wait_for()
    assert other.locator("#question textarea").input_value() == "What?"
    other.goto(f"{address}?image=00&budget=7")
    other.get_by_text("The link's budget is '7'").wait_for()
    other.close()


def test_a_link_to_an_upload_waits_for_the_file(page, tmp_path):
    film = write_dicom(tmp_path / "film.dcm", frames=4)
    page.locator("#file input[type=file]").set_input_files(film)
    page.locator(".thumb").nth(1).click()
    page.get_by_text("Frame 2 (2 of 4)").wait_for()
    page.locator("#question textarea").fill("What is shown?")
    page.locator("#boxes textarea").fill("0, 0, 0.5, 0.5")
    width = page.locator("#width input[type=number]")
    width.fill("900")
    width.press("Tab")
    ask(page)
    wait_for(
        page, "window.location.search.includes('picture=2') && window.location.search.includes('window=40%2C900')"
    )
    sparse = pixels_of(page, "sparse")
    page.goto(page.url)
    page.get_by_text("Choose the image of this link").wait_for()
    page.locator("#file input[type=file]").set_input_files(film)
    kept(page)
    page.get_by_text("Frame 2 (2 of 4)").wait_for()
    assert (pixels_of(page, "sparse"), boxes(page)) == (sparse, ["0, 0, 0.5, 0.5"])
    assert width.input_value() == "900"


def test_frames_by_slider_thumbnail_and_keyboard(page, tmp_path):
    page.locator("#file input[type=file]").set_input_files(write_dicom(tmp_path / "film.dcm", frames=4))
    page.get_by_text("Frame 3 (3 of 4)").wait_for()
    page.locator(".thumb").nth(3).wait_for()
    assert page.locator(".thumb[aria-pressed=true]").all_inner_texts() == ["Frame 3"]
    page.locator("#frame input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Frame 2 (2 of 4)").wait_for()
    wait_for(page, "document.querySelector('#facts textarea').value.includes('frame 2,')")
    wait_for(page, "document.querySelector('.thumb[aria-pressed=true]').dataset.place === '2'")
    page.locator("#question textarea").fill("What is shown?")
    drag(page, (0.1, 0.1), (0.4, 0.4))
    kept(page)
    assert boxes(page)[0].startswith("2: ")
    assert [float(v) for v in boxes(page)[0][3:].split(",")] == pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.015)
    page.locator(".thumb").nth(0).focus()
    page.keyboard.press("Enter")
    page.get_by_text("Frame 1 (1 of 4)").wait_for()
    page.wait_for_selector("#sparse img", state="detached")  # that answer was about frame 2
    drag(page, (0.25, 0.25), (0.55, 0.35))  # the box of frame 2 is not under the mouse here
    wait_for(page, "document.querySelector('#boxes textarea').value.split('\\n').length === 2")
    assert [line.split(":")[0] for line in boxes(page)] == ["2", "1"]


def test_steps_and_plans_have_pictures_and_milliseconds(page):
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    ask(page)
    captions = page.locator("#figures figcaption")
    captions.nth(2).wait_for()
    texts = captions.all_inner_texts()
    assert [re.match(r"(\d\. \w+) [\d.]+ ms\n", text)[1] for text in texts] == ["1. Localize", "2. Keep", "3. Reason"]
    assert all(page.locator("#figures img").nth(i).evaluate("i => i.naturalWidth") == 320 for i in range(3))
    page.locator("#ask-all").click()
    captions.nth(4).wait_for()
    for text in captions.all_inner_texts():
        assert re.search(r"\d ms\n\d+ of 64 tokens \(\d+%\).*\n→ ", text), text
    sources = page.locator("#figures img").evaluate_all("images => images.map(i => i.src)")
    assert len(set(sources)) > 2


def test_every_control_is_reached_by_the_tab_key(page, tmp_path):
    page.locator("#file input[type=file]").set_input_files(write_dicom(tmp_path / "film.dcm", frames=3))
    page.locator(".thumb").nth(2).wait_for()
    wanted = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, a[href], [role=listbox], [tabindex='0']")]
        .filter(e => e.checkVisibility({ checkVisibilityCSS: true }) && !e.disabled)
        .filter(e => e.type !== "file" && e.tabIndex >= 0)
        .map((e, i) => (e.dataset.stop = i))"""
    )
    page.locator("body").click(position={"x": 2, "y": 2})
    reached = set()
    for _ in range(2 * len(wanted)):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.stop"))
    assert {str(stop) for stop in wanted} - reached == set()


def test_bad_input_is_told_on_the_page(page):
    page.locator("#ask").click()
    page.get_by_text("Choose an example or a file first.").wait_for()
    page.locator("#file input[type=file]").set_input_files(
        {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.get_by_text("not an image of a known format").first.wait_for()
    assert page.locator("#preview img").count() == 0


def test_windows_and_frames_of_dicom(page, tmp_path):
    page.locator("#file input[type=file]").set_input_files(write_dicom(tmp_path / "one.dcm"))
    page.wait_for_selector("#preview img")
    width = page.locator("#width input[type=number]")
    assert width.input_value() == "400"
    before = page.locator("#preview img").get_attribute("src")
    drag(page, (0.4, 0.5), (0.8, 0.5), button="right")
    wait_for(page, "document.querySelector('#width input[type=number]').value > 410")
    wait_for(page, f"document.querySelector('#preview img').src != {before!r}")
    assert boxes(page) == []
    width.fill("1800")
    width.press("Tab")
    wait_for(page, f"document.querySelector('#preview img').src != {before!r}")
    page.locator("#file button[aria-label*=lear]").first.click()
    page.wait_for_selector("#preview img", state="detached")
    page.locator("#file input[type=file]").set_input_files(write_dicom(tmp_path / "two.dcm", frames=2))
    page.get_by_text("Frame 2 (2 of 2)").first.wait_for()
    page.wait_for_selector("#preview img")
    page.locator("#question textarea").fill("What is shown?")
    page.locator("#ask").click()
    page.wait_for_selector("#results td.answer")
    assert width.input_value() == "400"
    assert page.get_by_text("is less than minimum").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser, address, scheme, tmp_path):
    browsers.axe_script()  # skips where it cannot be had
    page = browser.new_page(viewport={"width": 1200, "height": 980}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator("#file input[type=file]").set_input_files(write_dicom(tmp_path / "film.dcm", frames=3))
    page.wait_for_selector(".thumb")
    page.wait_for_timeout(500)  # what fades in has no contrast yet
    assert browsers.serious_faults(page) == []
    page.locator(".example").nth(4).click()
    page.wait_for_selector(".thumb", state="detached")
    page.locator("#ask").click()
    kept(page)
    page.wait_for_timeout(500)  # what fades in has no contrast yet
    assert browsers.serious_faults(page) == []
    page.locator("#ask-all").click()
    page.wait_for_selector("#figures li:nth-child(4)")
    page.wait_for_timeout(500)  # what fades in has no contrast yet
    assert browsers.serious_faults(page) == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, address, scheme):
    """WCAG 2.1 AA: a contrast of 4.5 : 1 for each element that holds text directly."""
    page = browser.new_page(viewport={"width": 1200, "height": 980}, color_scheme=scheme)
    page.goto(address)
    page.locator(".example").nth(4).click()
    page.wait_for_selector("#preview img")
    page.locator("#ask").click()
    kept(page)
    page.wait_for_timeout(500)
    assert browsers.low_contrast(page) == []
    page.close()
