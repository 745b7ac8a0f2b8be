"""What a run writes while it goes on."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState

from vitos.engines.base import Sampling
from vitos.reports.overlay import draw_overlay
from vitos.reports.samples import draw_sample
from vitos.rl.callbacks import FiguresCallback, MetricsFileCallback, read_metrics, write_samples
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

ROW = '{"step": %d, "reward/localization": 0.5}\n'


def begin(folder, step):
    args, state = SimpleNamespace(output_dir=str(folder)), TrainerState(global_step=step)
    callback = MetricsFileCallback()
    callback.on_train_begin(args, state, TrainerControl())

    def log(step, **logs):
        callback.on_log(args, TrainerState(global_step=step), TrainerControl(), logs=logs)

    return log


def test_rows_are_json_lines_and_unknown_numbers_null(tmp_path):
    log = begin(tmp_path / "run", 0)
    log(1, **{"reward/localization": 0.25, "iou": math.nan, "loss": math.inf})
    log(2, train_runtime=3.0)  # Trainer's summary is no update
    log(2, **{"reward/localization": 0.5})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "reward/localization": 0.25, "iou": None, "loss": None},
        {"step": 2, "reward/localization": 0.5},
    ]


@pytest.mark.parametrize(("resumed_at", "left"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_drops_the_rows_behind_its_checkpoint(tmp_path, resumed_at, left):
    (tmp_path / "metrics.jsonl").write_text("".join(ROW % step for step in (1, 2, 3)) + '{"step": 4, "rew')
    log = begin(tmp_path, resumed_at)
    log(10, **{"reward/localization": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*left, 10]


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_bar_shows_figures_and_counts_updates(capsys):
    callback, control = FiguresCallback(), TrainerControl()
    state = TrainerState(global_step=2, max_steps=5, is_world_process_zero=True)
    callback.on_train_begin(SimpleNamespace(), state, control)
    state.global_step = 3
    callback.on_log(SimpleNamespace(), state, control, logs={"reward/localization": 0.123, "iou": 0.5})
    callback.on_train_end(SimpleNamespace(), state, control)
    shown = capsys.readouterr().err
    assert "3/5" in shown
    assert "r_loc=0.12, iou=0.50" in shown


@pytest.mark.parametrize(("columns", "figures"), [(80, 3), (120, 7), (40, 1), (24, 0)])
def test_the_line_fits_into_the_terminal(columns, figures, monkeypatch):
    """A real terminal; room is left for times of hours, which come later."""
    import contextlib
    import fcntl
    import os
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        callback, control = FiguresCallback(), TrainerControl()
        state = TrainerState(global_step=0, max_steps=1500, is_world_process_zero=True)
        callback.on_train_begin(SimpleNamespace(), state, control)
        keys = ["reward/localization", "reward/reasoning", "accuracy/localization", "accuracy/sparse", "iou"]
        for step in (1, 999, 1500):
            state.global_step = step
            logs = dict.fromkeys([*keys, "kept_ratio", "fallback_rate", "parse_rate"], 0.5)
            callback.on_log(SimpleNamespace(), state, control, logs=logs)
        callback.on_train_end(SimpleNamespace(), state, control)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    lines = [line for line in re.split(r"[\r\n]", shown.decode()) if line.strip()]
    assert "1500/1500" in lines[-1]
    assert max(map(len, lines)) <= columns
    assert lines[-1].count("=") == figures


def test_the_bar_of_an_evaluation_fits_into_80_columns():
    from tqdm import tqdm

    from vitos.eval import run

    source = Path(run.__file__).read_text(encoding="utf-8")
    longest = int(re.search(r'\.name\}"\[:(\d+)\]', source)[1])
    line = tqdm.format_meter(9_999, 10_000, 3000, prefix="x" * longest, unit="answer", rate=13.45, ncols=80)
    assert len(line) <= 80
    assert "answer/s]" in line


def test_samples_hold_every_text_and_the_first_boxes_drawn(tmp_path, warm_policy, phantom_records):
    records = phantom_records[:2]
    plan = RolloutOptions(
        num_localizations=2, num_reasonings=3, localize=Sampling(24, 1.0), reason=Sampling(14, 1.0), seed=0
    )
    batch = roll_out(warm_policy, records, ScanStore(warm_policy).get(records), 0, plan, RewardWeights())
    write_samples(tmp_path, 7, batch.groups, draw_sample)
    rows = json.loads((tmp_path / "samples" / "step-7.json").read_text())
    for index, (row, group) in enumerate(zip(rows, batch.groups, strict=True)):
        assert row["id"] == records[index].id
        assert row["overlay"] == f"step-7-{index}.png"
        for entry, rollout, kept, rewards, answers in zip(
            row["localizations"],
            group.localizations,
            group.kept,
            group.rewards.localization,
            group.reasonings,
            strict=True,
        ):
            assert entry["text"] == rollout.completion.text
            assert entry["reasonings"] == [answer.completion.text for answer in answers]
            assert entry["rewards"] == list(rewards)
            assert (entry["kept_ratio"], entry["fallback"]) == (kept.mask.mean(), kept.fallback)
        drawn = draw_overlay(
            Image.open(records[index].image_paths[0]),
            group.kept[0].grid,
            group.kept[0].mask,
            group.localizations[0].response.boxes,
            records[index].boxes,
        )
        assert Image.open(tmp_path / "samples" / row["overlay"]).tobytes() == drawn.tobytes()
