"""The report of an evaluation, read back with a parser."""

import base64
import hashlib
import io
import json
import random

import pytest
from PIL import Image
from tests.reports.page import Page

from vitos.data.images import ImageError
from vitos.reports import cases as packed
from vitos.reports.html import write_report
from vitos.reports.values import ResultsError


@pytest.fixture
def report(tmp_path, results, case):
    """Write a report of the given parts, or the usual ones, and read it."""

    def make(results=results, cases=(case,), metrics=()):
        write_report(tmp_path, results, cases, metrics)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


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
        "68.3% right, from its own boxes only",
        "24.1% of the visual tokens seen",
        "+26.3 points against as many random tokens",
        "vitos eval recipes/quickstart.yaml",
    ):
        assert part in page.words
    assert len(page.all("img")) == 4  # overview, example, budgets, curves
    assert {link["href"] for link in page.all("a")} <= {f"#{attrs.get('id')}" for _, attrs in page.elements}


def test_parts_without_figures_are_left_out(report, results):
    page = report(results=dict.fromkeys(results), cases=[])
    for part in ("Token budgets", "Time per question", "Training", "Origin", "None of"):
        assert part not in page.words
    assert page.all("img") == []
    assert "All cases" not in page.words
    assert not page.all("script")


def test_report_needs_nothing_from_outside_and_runs_its_one_script_only(report, tmp_path):
    page = report()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "https://" not in html
    assert "url(" not in html.replace("url(#", "")
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:").startswith("data:")
    assert not page.all("link")
    (script,) = [data for attrs, data in page.scripts if "type" not in attrs]
    (policy,) = [meta["content"] for meta in page.all("meta") if "default-src 'none'" in (meta.get("content") or "")]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "script-src 'self'" not in policy


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
    assert len(page.all("script")) == 3  # two blocks of data and the page's own
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    in_block = place not in ("name", "by_template")
    assert json.dumps(attack)[1:-1] in json.dumps(page.block) if in_block else attack in page.words


def test_a_case_holds_question_answers_boxes_and_masks(report, case):
    case["conditions"]["sparse"]["text"] = "<think>I see <b>two</b></think><answer>B</answer>"
    page = report()
    packed_case = page.case
    assert packed_case["question"] == "How many?\nA. 1\nB. 2"
    assert (packed_case["gold"], packed_case["gold_boxes"]) == ("B. 2", [[0, 0, 0.5, 0.5]])
    sparse = packed_case["conditions"]["sparse"]
    assert (sparse["thought"], sparse["answer"], sparse["correct"]) == ("I see <b>two</b>", "B. 2", True)
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(sparse["mask"]))
    assert [i for i, bit in enumerate(bits) if bit == "1"] == case["conditions"]["sparse"]["kept"]
    assert (sparse["count"], sparse["kept"]) == (4, 0.25)
    unread = packed_case["conditions"]["random"]
    assert (unread["answer"], unread["written"]) == ("", "unclear")
    assert packed_case["conditions"]["localization"]["iou"] == 1.0


def test_the_first_right_answer_is_the_example(report, case):
    wrong = json.loads(json.dumps(case | {"id": "first"}))
    wrong["conditions"]["sparse"]["correct"] = False
    shown = report(cases=[wrong, case]).all("img")[1]
    assert shown["alt"] == "Image of case test/0/0: 4 of 16 visual tokens kept, 1 predicted and 1 gold boxes."
    picture = Image.open(io.BytesIO(base64.b64decode(shown["src"].split(",", 1)[1])))
    assert picture.size == (384, 384)
    assert max(picture.getpixel((300, 300))) < 130 < 180 < min(picture.getpixel((70, 70)))


def test_all_cases_are_there_and_an_image_is_stored_once(report, case):
    page = report(cases=[case | {"id": f"id{i}"} for i in range(60)])
    assert [row["id"] for row in page.block["cases"]] == [f"id{i}" for i in range(60)]
    assert len(json.loads(page.script("pictures"))) == 1


def test_many_pictures_lie_beside_the_page(report, case, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MAX_INSIDE", 2)
    cases = []
    for i in range(3):
        Image.new("RGB", (900, 450), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        cases.append(case | {"image": f"{i}.png"})
    sources = json.loads(report(cases=cases).script("pictures"))
    assert sources == [f"report_images/{i}.jpg" for i in range(3)]
    assert [Image.open(tmp_path / source).size for source in sources] == [(640, 320)] * 3
    report(cases=cases)  # again, over the same files


def test_long_texts_are_cut_until_the_file_is_small_and_it_says_so(report, case, monkeypatch):
    rng = random.Random(0)
    case["conditions"]["sparse"]["text"] = "<think>" + "".join(rng.choices("abcdefghij ", k=1000)) + "</think>"
    page = report(cases=[case])
    assert "Texts are cut" not in page.words
    monkeypatch.setattr(packed, "MAX_BLOCK", len(page.script("block")) - 200)
    page = report(cases=[case])
    assert "Texts are cut at 500 characters to keep this file small" in page.words
    assert len(page.case["conditions"]["sparse"]["thought"]) == 502


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
