"""A name of a checkpoint: an embedded model, a folder, or a hub id."""

import pytest

from vitos.policy.locate import resolve_model_path


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        resolve_model_path(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="runs/quickstart/model"):
        resolve_model_path("runs/quickstart/model/nowhere")
    assert resolve_model_path("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert resolve_model_path(tmp_path) == tmp_path
