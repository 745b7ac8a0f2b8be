"""Samples in TensorBoard (its files are read back), and the calls that W&B and trackio get."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from vitos.rl.trackers import COLUMNS, track_samples


@pytest.fixture
def run(tmp_path):
    """A run whose third update left two samples, one of them with a picture."""
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.new("RGB", (12, 8), "navy").save(folder / "step-3-0.png")
    first = {"text": "<think>a|b</think>", "kept_ratio": 0.25, "fallback": False, "rewards": [1.0, 0.5]}
    row = {"id": "a/0", "question": "What?\nA. x", "gold": "A", "localizations": [first | {"reasonings": ["x", "y"]}]}
    rows = [row | {"overlay": "step-3-0.png"}, row | {"id": "a/1"}]
    (folder / "step-3.json").write_text(json.dumps(rows))
    return tmp_path


def test_tensorboard_has_the_table_and_the_pictures(run, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra trackers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "logs"))
    track_samples([TensorBoardCallback(writer), TrainerCallback()], run, 3)
    writer.close()
    read = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0, "tensors": 0})
    read.Reload()
    (image,) = read.Images("samples/0")
    assert (image.step, image.width, image.height) == (3, 12, 8)
    (text,) = read.Tensors("samples/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert len(table) == 4
    assert table[0].count("|") == len(COLUMNS) + 1
    assert "&lt;think>a\\|b&lt;/think>" in table[2]
    assert table[3].startswith("| a/1 |")


class Tool:
    """What W&B and trackio have in common."""

    def __init__(self):
        self.logged = []

    def Image(self, picture, caption):
        return np.asarray(picture).shape, caption

    def Table(self, columns, data):
        return columns, data

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize(("kind", "attribute"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_the_others_get_images_and_a_table(run, kind, attribute):
    callback, tool = object.__new__(kind), Tool()
    callback._initialized = True
    setattr(callback, attribute, tool)
    track_samples([callback], run, 3)
    (logged,) = tool.logged
    assert logged["samples/0"] == ((8, 12, 3), "a/0")
    columns, data = logged["samples/table"]
    assert columns == [*COLUMNS]
    assert data[0] == ["a/0", "What?\nA. x", "A", "<think>a|b</think>", "x", 0.25, False, 0.75]
    assert logged["train/global_step"] == 3
    callback._initialized = False
    track_samples([callback], run, 3)
    assert len(tool.logged) == 1


def test_the_real_tables_and_images_of_trackio_take_them(run):
    trackio = pytest.importorskip("trackio", reason="needs the extra trackers")
    tool = SimpleNamespace(Image=trackio.Image, Table=trackio.Table, log=lambda values: seen.update(values))
    callback, seen = object.__new__(TrackioCallback), {}
    callback._initialized, callback._trackio = True, tool
    track_samples([callback], run, 3)
    assert seen["samples/table"].data[1]["id"] == "a/1"


def test_training_sends_its_samples(monkeypatch, phantom_records, warm_policy, clone_policy, tmp_path):
    from vitos.rl import trainer
    from vitos.rl.config import DualStreamConfig

    seen = []
    monkeypatch.setattr(
        trainer, "track_samples", lambda callbacks, run, step: seen.append((run, step, list(callbacks)))
    )
    config = DualStreamConfig(
        output_dir=str(tmp_path / "run"), localization_steps=1, reasoning_steps=1, questions_per_step=1,
        num_localizations=2, num_reasonings=2, max_localization_tokens=16, max_reasoning_tokens=8,
        log_samples_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer.DualStreamTrainer(clone_policy(warm_policy), config, phantom_records[:2]).train()
    assert [(run.name, step) for run, step, _ in seen] == [("run", 1), ("run", 2)]
    assert all(callbacks for *_, callbacks in seen)
