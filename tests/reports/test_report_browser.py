"""The report in headless Chromium: filters, one case, keyboard, width, size, accessibility."""

import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from vitos.reports.html import write_report

browsers = pytest.importorskip("tests.browser")
pytestmark = [pytest.mark.slow, browsers.needs_chromium]


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as chromium:
        yield chromium


def copies(case, count):
    """`count` cases; every third is wrong, every fifth has another template, every seventh fell back."""
    made = []
    for i in range(count):
        other = json.loads(json.dumps(case)) | {"id": f"id{i}", "template": "where" if i % 5 == 0 else "how_many"}
        other["question"] = f"<image>Question {i}?\nA. 1\nB. 2"
        other["conditions"]["sparse"] |= {"correct": i % 3 != 0, "fallback": i % 7 == 0}
        other["conditions"]["dense"] = {"text": "<answer>A</answer>", "answer": "A", "correct": i % 2 == 0}
        made.append(other)
    return made


@pytest.fixture
def opened(browser, tmp_path, results, case):
    """`opened(cases, width)`: the page of a report; fails on anything that its script throws or the policy refuses."""
    errors = []

    def make(cases, width=1280, **options):
        write_report(tmp_path, results, cases)
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (errors.append("a text was run"), dialog.dismiss()))
        page.goto((tmp_path / "report.html").as_uri())
        page.locator("#shown", has_text="cases)").wait_for()  # the policy forbids functions as texts
        return page

    yield make
    assert errors == []


def shown(page):
    return page.locator("#shown").inner_text()


def test_filters_leave_the_cases_that_fit(opened, case):
    page = opened(copies(case, 120))
    assert shown(page) == "1–50 of 120 (120 cases)"
    page.locator("select[name=verdict]").select_option("wrong")
    assert shown(page) == "1–40 of 40 (120 cases)"
    page.locator("select[name=template]").select_option("where")
    assert shown(page) == "1–8 of 8 (120 cases)"
    page.get_by_role("button", name="Clear").click()
    page.locator("select[name=pair]").select_option("gained")
    assert shown(page) == f"1–40 of {sum(i % 3 != 0 and i % 2 == 1 for i in range(120))} (120 cases)"
    page.get_by_role("button", name="Clear").click()
    page.locator("input[name=fallback]").check()
    assert shown(page) == "1–18 of 18 (120 cases)"
    page.get_by_role("button", name="Clear").click()
    page.locator("input[name=low]").fill("26")
    assert shown(page) == "No case fits (120 cases)"
    page.locator("input[name=low]").fill("25")
    page.locator("input[name=search]").fill("question 11")
    assert shown(page) == "1–11 of 11 (120 cases)"
    page.locator("input[name=search]").fill("")
    page.get_by_role("button", name="Next").click()
    assert shown(page) == "51–100 of 120 (120 cases)"


def test_a_case_opens_with_its_pictures_side_by_side(opened, case):
    page = opened(copies(case, 3))
    page.get_by_role("button", name="Question 1?").click()
    dialog = page.locator("dialog[open]")
    dialog.wait_for()
    heads = dialog.locator("#case-answers h3").all_inner_texts()
    assert heads == ["Gold", "Trained model, all tokens", "Sparse branch, kept tokens", "Random tokens"]
    text = dialog.inner_text()
    assert "I see two" in text
    assert "4 of 16 tokens kept" in text
    assert "<think>" not in text
    tops = {round(box["y"]) for box in (card.bounding_box() for card in dialog.locator("#case-answers .answer").all())}
    assert len(tops) == 1
    # The dropped corner is darker than the kept one, in the picture as it is drawn.
    svg = dialog.locator("#case-answers svg").nth(2)
    picture = Image.open(io.BytesIO(svg.screenshot())).convert("L")
    width, height = picture.size
    assert picture.getpixel((round(0.3 * width), round(0.3 * height))) > 180
    assert picture.getpixel((round(0.8 * width), round(0.8 * height))) < 110


def test_by_keyboard_alone(opened, case):
    page = opened(copies(case, 5))
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "search"
    page.get_by_role("button", name="Question 0?").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    assert page.locator("#case-title").inner_text().startswith("id1")
    page.keyboard.press("ArrowRight")
    page.locator("#case-title", has_text="id2").wait_for()
    assert page.url.endswith("#case=3")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    # The browser gives the focus back first, and the page's own handler of "close", which comes later, moves it.
    page.wait_for_function("document.activeElement.textContent === 'Question 2?'")


def test_a_link_opens_its_case(opened, case, tmp_path):
    page = opened(copies(case, 5))
    page.goto("about:blank")
    page.goto((tmp_path / "report.html").as_uri() + "#case=4")
    page.locator("dialog[open]").wait_for()
    assert page.locator("#case-title").inner_text().startswith("id3")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(opened, case, width, scheme):
    page = opened(copies(case, 60), width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 1280:
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
    page.locator("#cases-table tbody button").first.click()
    page.locator("dialog[open]").wait_for()
    assert page.evaluate(
        "document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth"
    )
    sizes = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && e.innerText && "
        "!e.children.length).map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_untrusted_text_is_not_run(opened, case):
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script></script><script>alert(3)</script>"
    case |= {"question": attack, "template": attack, "gold": attack, "id": attack}
    case["conditions"]["sparse"] |= {"text": f"<think>{attack}</think><answer>{attack}</answer>", "answer": None}
    page = opened([case])
    page.locator("#cases-table tbody button").first.click()
    page.locator("dialog[open]").wait_for()
    assert attack in page.locator("#case-answers").inner_text()


def test_five_thousand_cases_are_small_and_shown(opened, case, tmp_path):
    """How soon they are painted: `python -m benchmarks report`."""
    rng, words = random.Random(0), Path(__file__).read_text().split()
    cases = copies(case, 5000)
    for one in cases:
        one["grid"] = [{"rect": [0, 0, 1, 1], "rows": 32, "cols": 32}]
        for condition in one["conditions"].values():
            condition["text"] = f"<think>{' '.join(rng.choices(words, k=60))}</think><answer>B</answer>"
            if "kept" in condition:
                condition["kept"] = sorted(rng.sample(range(1024), 120))
    page = opened(cases)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert shown(page) == "1–50 of 5,000 (5,000 cases)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened, case, scheme):
    browsers.axe_script()  # skips where it cannot be had
    page = opened(copies(case, 60), color_scheme=scheme)
    assert browsers.serious_faults(page) == []
    page.locator("#cases-table tbody button").first.click()
    page.locator("dialog[open]").wait_for()
    assert browsers.serious_faults(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(opened, case, scheme):
    page = opened(copies(case, 20), color_scheme=scheme)
    assert browsers.low_contrast(page) == []
    page.locator("#cases-table tbody button").first.click()
    page.locator("dialog[open]").wait_for()
    assert browsers.low_contrast(page) == []
