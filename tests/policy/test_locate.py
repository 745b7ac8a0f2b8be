"""Names of models: folders, runs, embedded models, hub ids, and names that are none."""

import time
from contextlib import nullcontext
from urllib.error import HTTPError

import pytest

from vitos.nano import NANO_PATH
from vitos.policy import locate
from vitos.policy.locate import resolve_model_path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("model", "run/model", "run/stage1", "other/stage1", "empty"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_runs_and_embedded_models(folders):
    assert resolve_model_path("nano") == NANO_PATH
    assert resolve_model_path("model") == resolve_model_path(folders / "model").relative_to(folders)
    assert resolve_model_path(folders / "run") == folders / "run" / "model"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "holds no model"),
        ("other", "it has stage1 inside"),
        ("./nope", "no such folder"),
        ("/nope/nope", "no such folder"),
        ("a/b/c", "no such folder"),
        ("nope", "no such folder, and the Hugging Face hub has no such model"),
        ("nanno", "did you mean nano?"),
        ("run/modle", "did you mean run/model?"),
        ("mode", "did you mean model?"),
        ("not a name!", "no such folder"),
    ],
)
def test_what_is_no_model_is_said_at_once(folders, name, said):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model_path(name)
    assert said in str(caught.value)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("status", "found"), [(200, True), (403, True), (401, True), (404, False), (500, False)])
def test_the_hub_is_asked_once_and_its_answer_counts(folders, monkeypatch, status, found):
    from huggingface_hub import constants

    asked = []

    def answer(request, timeout):
        asked.append((request.get_method(), request.full_url, timeout))
        if status != 200:
            raise HTTPError(request.full_url, status, "", {}, None)
        return nullcontext()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locate, "urlopen", answer)
    if found:
        assert resolve_model_path("owner/name") == "owner/name"
    else:
        with pytest.raises(FileNotFoundError, match="hub has no such model"):
            resolve_model_path("owner/name")
    ((method, address, timeout),) = asked
    assert (method, timeout) == ("HEAD", locate.HUB_SECONDS)
    assert "owner/name" in address


def test_a_model_in_the_cache_needs_no_hub(folders, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert resolve_model_path("owner/name") == "owner/name"
