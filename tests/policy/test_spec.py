"""`vitos.json`: round trip, refusals that name the file, prompts."""

import json

import pytest

from vitos.core.sparsify import Fusion, KeepRule
from vitos.policy.spec import FILE_NAME, VitosSpec

CUSTOM = VitosSpec(
    localize_prompt="Q: {question} ({coordinates}) µ",
    reason_prompt="{question}!",
    coordinates="per_mille",
    keep=KeepRule(margin=2, min_tokens=5),
    fusion=Fusion("mean", 0.3),
    positions="renumber",
)


@pytest.mark.parametrize("spec", [VitosSpec(), CUSTOM])
def test_round_trip_with_the_geometry_in_force(spec, nano, tmp_path):
    spec.save(tmp_path, nano)
    loaded = VitosSpec.load(tmp_path)
    assert loaded.geometry == nano.geometry
    assert loaded == type(spec)(
        **{f: getattr(spec, f) for f in spec.__dataclass_fields__} | {"geometry": nano.geometry}
    )
    written = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    assert written["format"] == 1
    assert written["geometry"] == {
        "patch_size": 8,
        "merge_size": 2,
        "min_pixels": 1024,
        "max_pixels": 65536,
        "rules": {},
    }


def test_an_ordinary_model_has_none(tmp_path):
    assert VitosSpec.load(tmp_path) is None


def edited(folder, nano, **changes):
    VitosSpec().save(folder, nano)
    data = json.loads((folder / FILE_NAME).read_text()) | changes
    (folder / FILE_NAME).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format is not 1"),
        ({"format": ...}, "format is not 1"),
        ({"keep": ...}, "keep"),
        ({"keep": {"margin": -1}}, "margin must be >= 0"),
        ({"keep": {"margins": 1}}, "margins"),
        ({"fusion": {"mode": "median"}}, "fusion mode"),
        ({"fusion": None}, "NoneType"),
        ({"geometry": {"patch_size": 8}}, "merge_size"),
        ({"positions": "renumbered"}, "positions must be one of keep, renumber"),
        ({"coordinates": "pixels"}, "coordinates must be one of"),
        ({"localize_prompt": "What is it?"}, "localize_prompt must contain {question}"),
        ({"reason_prompt": 3}, "int"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_a_foreign_file_is_refused_by_name(nano, tmp_path, changes, problem):
    edited(tmp_path, nano, **changes)
    with pytest.raises(ValueError, match=f"{FILE_NAME}: not a valid") as caught:
        VitosSpec.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"3", b"\xff\xfe", b"{}"])
def test_a_corrupt_file_is_refused_by_name(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME}: not a valid"):
        VitosSpec.load(tmp_path)


def test_another_geometry_is_refused(nano, windowed, tmp_path):
    VitosSpec().check_geometry(nano, "a model without vitos.json")  # nothing known, nothing refused
    VitosSpec().save(tmp_path, nano)
    spec = VitosSpec.load(tmp_path)
    spec.check_geometry(nano, "here")
    with pytest.raises(ValueError, match=r"runs/x: trained with .*patch_size=8.*patch_size=4.*Restore preprocessor"):
        spec.check_geometry(windowed, "runs/x")


def test_only_the_pixel_budget_differs(nano, tmp_path):
    VitosSpec().save(tmp_path, nano)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    data["geometry"]["max_pixels"] += 1
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="max_pixels"):
        VitosSpec.load(tmp_path).check_geometry(nano, "here")


def test_prompts():
    question = "Is {coordinates} or {question} a finding?\nA. yes"
    assert CUSTOM.localize_text(question) == f"Q: {question} (from 0 to 1000 over the image's width and height) µ"
    assert CUSTOM.reason_text(question) == f"{question}!"
    default = VitosSpec()
    assert "pixels of the image" in VitosSpec(coordinates="absolute").localize_text("Q")
    assert default.localize_text("Q").startswith("Q\nFirst think")
    assert "evidence" not in default.reason_text("Q")
