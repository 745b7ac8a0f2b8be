"""The memory of a volume: what is counted is what the prompts hold."""

import json

import pytest
from benchmarks.__main__ import app
from typer.testing import CliRunner


def test_a_small_measurement(tmp_path):
    args = [
        "volume",
        "--out",
        str(tmp_path),
        "--slices",
        "6",
        "--size",
        "128",
        "--evidence",
        "2",
        "--kept",
        "0.25",
        "--tokens",
        "2",
    ]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    results = json.loads((tmp_path / "volume.json").read_text())
    one, dense, sparse = results["prompts"].values()
    assert (results["visual_tokens"], results["kept_tokens"]) == (6 * 64, 2 * 16)
    assert [row["visual"] for row in (one, dense, sparse)] == [64, 384, 32]
    # nano: 4 layers, keys and values of 2 heads of 32 numbers of 4 bytes.
    assert all(row["kv_bytes"] == row["tokens"] * 4 * 2 * 64 * 4 for row in (one, dense, sparse))
    assert dense["peak_bytes"] > 2 * max(one["peak_bytes"], sparse["peak_bytes"])
    assert "| reason: evidence alone |" in (tmp_path / "volume.md").read_text()


def test_settings_that_cannot_be_measured_are_refused():
    said = CliRunner().invoke(app, ["volume", "--out", "x", "--slices", "2", "--evidence", "3"])
    assert isinstance(said.exception, ValueError)
    assert "evidence <= slices" in str(said.exception)


@pytest.mark.parametrize("missing", ["--out"])
def test_a_folder_must_be_named(missing):
    assert CliRunner().invoke(app, ["volume"]).exit_code == 2
