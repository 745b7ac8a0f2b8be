"""The report of an evaluation, read back with a parser."""

import base64
import copy
import io

import pytest
from PIL import Image
from tests.reports.page import Page

from vitos.data.images import ImageError
from vitos.reports.html import MAX_CASES, select_cases, write_report
from vitos.reports.values import ResultsError


@pytest.fixture
def report(tmp_path, results, case):
    """Write a report of the given parts, or the usual ones, and read it."""

    def make(results=results, cases=(case,), metrics=()):
        write_report(tmp_path, results, cases, metrics)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def variant(case, correct, template="how_many", ident="x"):
    other = copy.deepcopy(case)
    other |= {"id": ident, "template": template}
    other["conditions"]["sparse"]["correct"] = correct
    return other


def test_report_has_every_part(report):
    page = report(metrics=[{"step": 1, "iou": 0.1}, {"step": 2, "iou": 0.2}])
    assert [tag for tag, _ in page.elements if tag in ("html", "head", "body")] == ["html", "head", "body"]
    for part in (
        "quickstart · phantom/test · 600 questions · seed 3",
        "Not a medical device",
        "Relative performance (sparse ÷ base) is 111.6%",
        "Main figures",
        "Controls",
        "By question template",
        "Token budgets",
        "Time per question",
        "Training",
        "Answered rightly (1)",
        "Answered wrongly (0)",
        "vitos eval recipes/quickstart.yaml",
    ):
        assert part in page.words
    assert len(page.all("img")) == 3  # budgets, curves, one case


def test_parts_without_figures_are_left_out(report, results):
    page = report(results=dict.fromkeys(results), cases=[])
    for part in ("Token budgets", "Time per question", "Training", "Origin", "None of"):
        assert part not in page.words
    assert page.all("img") == []
    assert "among 0 questions" in page.words


def test_report_needs_nothing_from_outside_and_no_script(report, tmp_path):
    page = report()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:").startswith("data:")
    assert not page.all("script")
    assert not page.all("link")
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


@pytest.mark.parametrize("place", ["text", "question", "id", "template", "answer", "name", "by_template"])
def test_untrusted_text_is_shown_not_run(report, results, case, place):
    attack = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>"
    if place in ("text", "answer"):
        case["conditions"]["sparse"][place] = attack
    elif place == "name":
        results["name"] = attack
    elif place == "by_template":
        results["by_template"][attack] = {"num_questions": 1}
    else:
        case[place] = attack
    page = report(results=results, cases=[case])
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert attack in page.words


def test_a_case_shows_question_texts_verdicts_and_picture(report):
    page = report()
    for part in (
        "How many? A. 1 B. 2",
        "Gold answer: B",
        "two of them",
        "I see two",
        "unclear",
        "B, right",
        "no answer",
        "IoU 1.00",
        "4 of 16 visual tokens kept",
    ):
        assert part in page.words
    assert "<image>" not in page.words
    shown = page.all("img")[-1]
    assert shown["alt"] == "Image of case test/0/0: 4 of 16 visual tokens kept, 1 predicted and 1 gold boxes."
    picture = Image.open(io.BytesIO(base64.b64decode(shown["src"].split(",", 1)[1])))
    assert picture.size == (int(shown["width"]), int(shown["height"])) == (384, 384)
    assert max(picture.getpixel((300, 300))) < 130 < 180 < min(picture.getpixel((70, 70)))


def test_failures_of_a_case_are_named(report, case):
    case["conditions"]["localization"] |= {"parsed": False, "boxes": [], "iou": None}
    case["conditions"]["sparse"] |= {"fallback": True, "kept": list(range(16)), "correct": False, "answer": "A"}
    words = report(cases=[case]).words
    assert "boxes did not parse" in words
    assert "fell back to all tokens" in words
    assert "A, wrong" in words


def test_long_text_is_cut_and_says_so(report, case):
    case["conditions"]["sparse"]["text"] = "w" * 1300
    words = report(cases=[case]).words
    assert "w" * 1200 + " … (100 more characters in cases.jsonl)" in words
    assert "w" * 1201 not in words


def test_large_images_become_thumbnails(report, case, tmp_path):
    Image.new("RGB", (2000, 1000)).save(tmp_path / "image.png")
    shown = report(cases=[case]).all("img")[-1]
    assert int(shown["width"]) <= 1280
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_choice_takes_templates_in_turn_and_keeps_the_order(case):
    order = "aaaabbc"
    cases = [variant(case, True, template, f"{i}") for i, template in enumerate(order)]
    right, wrong = select_cases(cases, per_group=4)
    assert [c["id"] for c in right] == ["0", "1", "4", "6"]  # a, b, c, then a again
    assert wrong == []


def test_choice_leaves_out_cases_without_a_verdict(case):
    unknown = variant(case, None)
    missing = {**case, "conditions": {"sparse": None}}
    right, wrong = select_cases([unknown, missing, variant(case, False)])
    assert (len(right), len(wrong)) == (0, 1)


def test_number_of_cases_is_bounded(report, case):
    page = report(cases=[variant(case, i % 2 == 0, ident=f"id{i}") for i in range(60)])
    assert len(page.all("article")) == MAX_CASES


def test_missing_image_is_named(report, case):
    case["image"] = "gone/slice.png"
    with pytest.raises(ImageError, match=r"gone/slice\.png"):
        report(cases=[case])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold_boxes": [[0.5, 0, 0.2, 1]]}, r"case 'test/0/0', field 'gold_boxes'"),
        ({"gold_boxes": [[0.5, 0]]}, r"case 'test/0/0', field 'gold_boxes'"),
        ({"grid": [{"rect": [0, 0, 1, 1], "rows": 4}]}, r"case 'test/0/0', field 'grid'"),
        ({"grid": [{"rect": [0, 0, 1, 1], "rows": 1, "cols": 2}]}, r"case 'test/0/0', condition 'sparse'"),
    ],
)
def test_a_broken_field_is_named_with_its_case(report, case, change, message):
    with pytest.raises(ResultsError, match=message):
        report(cases=[case | change])


@pytest.mark.parametrize("name", ["image", "question", "conditions"])
def test_a_missing_field_is_named(report, case, name):
    del case[name]
    with pytest.raises(ResultsError, match=f"case 'test/0/0' has no field '{name}'"):
        report(cases=[case])


def test_a_failed_report_leaves_the_old_one(report, case, tmp_path):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ImageError):
        report(cases=[case | {"image": "gone.png"}])
    assert (tmp_path / "report.html").read_text() == "old"


def test_report_can_be_written_elsewhere(tmp_path, results, case):
    write_report(tmp_path, results, [case], out=tmp_path / "other.html")
    assert [path.name for path in tmp_path.glob("*.html")] == ["other.html"]
