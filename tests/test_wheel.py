"""What pip installs: the wheel is built, looked into, installed outside of the repository and used from there.

The environment is fresh. It holds the wheel and sees the other packages of the running interpreter, but neither that
interpreter's vitos nor the repository. Each command in it reports which files its modules came from.
"""

import json
import os
import signal
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.processes import free_port, page_of

from vitos.config.recipe import dump_recipe, load_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
MOST_LINES = 39_500
"""The aim of the renovation was 21,000, for what the package did then. It must not grow unseen; 2,000 came with the
frames of the demo, plan glance and the small model."""
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")
HIDDEN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VITOS_TRACEBACK"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in HIDDEN}
# A module that each Python of the fresh environment loads at its start: at its end it writes what was imported.
TRACE = """
import atexit, os, sys

@atexit.register
def write():
    with open(os.environ["TRACE_FILE"], "w") as file:
        for name, module in sys.modules.items():
            if name.partition(".")[0] in ("vitos", "benchmarks", "tests"):
                print(module.__file__, file=file)
        for entry in sys.path:
            print("path", os.path.abspath(entry), file=file)
"""


def run(*command, cwd, **environment):
    """Standard output of a command that succeeds."""
    words = list(map(str, command))
    done = subprocess.run(
        words, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source, folder):
    """The wheel of a folder or sdist, made offline by the hatchling that the extra `dev` brings."""
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def contents(wheel):
    """Name → bytes of everything in a wheel but its own record."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


# --- what is in it --------------------------------------------------------------------------------------------------


def test_the_wheel_is_the_package_and_the_recipes_and_nothing_else(wheel):
    package = [path for path in (ROOT / "src/vitos").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT / "src")): path.read_bytes() for path in package}
    expected |= {f"vitos/{path.relative_to(ROOT)}": path.read_bytes() for path in RECIPES.rglob("*.yaml")}
    assert {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name} == expected


@pytest.mark.parametrize(
    "name",
    [
        "vitos/py.typed",
        "vitos/nano/weights/model.safetensors",
        "vitos/nano/weights/tokenizer.json",
        "vitos/nano/volumes/model.safetensors",
        "vitos/nano/real/decoder.safetensors",
        "vitos/reports/card.md.j2",
        "vitos/reports/report.html.j2",
        "vitos/reports/report.js",
        "vitos/reports/report.css",
        "vitos/serve/demo/demo.js",
        "vitos/recipes/quickstart.yaml",
        "vitos/recipes/lingshu-7b.yaml",
        "vitos/recipes/accelerate/8gpu.yaml",
    ],
)
def test_files_that_are_no_code_are_in_it(wheel, name):
    assert name in contents(wheel)


def test_it_stays_small(wheel):
    lines = sum(data.count(b"\n") for name, data in contents(wheel).items() if name.endswith(".py"))
    assert lines <= MOST_LINES, f"{lines:,} lines of Python; what only developers run belongs to benchmarks/"


def test_licences_and_commands_are_in_its_metadata(wheel):
    metadata = {name.partition(".dist-info/")[2]: data for name, data in contents(wheel).items()}
    for name in ("LICENSE", "NOTICE"):
        assert metadata[f"licenses/{name}"] == (ROOT / name).read_bytes()
    assert b"vitos = vitos.cli.main:main" in metadata["entry_points.txt"]


def test_the_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (source,) = tmp_path.glob("*.tar.gz")
    assert contents(build(source, tmp_path)) == contents(wheel)


# --- what it does ---------------------------------------------------------------------------------------------------


@dataclass
class Installed:
    """An environment outside of the repository, and an empty folder to work in."""

    folder: Path
    packages: Path
    work: Path

    def vitos(self, *words):
        """Output of the installed command, every module of which must come from the environment."""
        trace = self.folder / "trace.txt"
        trace.unlink(missing_ok=True)
        out = run(self.folder / "bin/vitos", *words, cwd=self.work, TRACE_FILE=str(trace), COLUMNS="250")
        self.check(trace)
        return out

    def served(self, address, *words):
        """What an installed command serves at an address, after which it is interrupted; as `vitos`."""
        trace = self.folder / "trace.txt"
        trace.unlink(missing_ok=True)
        words = [str(self.folder / "bin/vitos"), *map(str, words)]
        environment = ENVIRONMENT | {"TRACE_FILE": str(trace)}
        with open(self.folder / "log.txt", "w+") as log:
            server = subprocess.Popen(words, cwd=self.work, env=environment, stdout=log, stderr=log)
            try:
                page = page_of(address, server)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(60)
            log.seek(0)
            assert page is not None, log.read()
        self.check(trace)
        return page

    def check(self, trace):
        lines = trace.read_text().splitlines()
        modules = [Path(line) for line in lines if not line.startswith("path ")]
        assert self.packages / "vitos/cli/main.py" in modules
        assert [file for file in modules if not file.is_relative_to(self.packages / "vitos")] == []
        path = {Path(line.removeprefix("path ")) for line in lines if line.startswith("path ")}
        assert path.isdisjoint({ROOT, ROOT / "src"})


def install(wheel, root):
    """A fresh environment with a wheel, which sees the other packages of the running interpreter behind it."""
    folder, work = root / "environment", root / "work"
    work.mkdir(parents=True)
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(*PIP, "--python", python, "install", *OFFLINE, wheel, cwd=work)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work).strip())
    (packages / "trace_vitos.py").write_text(TRACE)
    # Folders named in a .pth file go to the end of the path, and their own .pth files, such as that of an editable
    # vitos, are not read.
    heavy = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "zz_heavy.pth").write_text("\n".join([*heavy, "import trace_vitos"]) + "\n")
    return Installed(folder, packages, work)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("installed"))


def test_a_dry_run_of_the_quickstart_prints_its_values(installed):
    assert installed.vitos("train", "quickstart", "--dry-run") == dump_recipe(load_recipe(RECIPES / "quickstart.yaml"))


def test_recipes_are_listed_and_shown(installed):
    listed = installed.vitos("recipes")
    assert all(path.stem in listed for path in RECIPES.rglob("*.yaml"))
    assert installed.vitos("recipes", "show", "quickstart") == (RECIPES / "quickstart.yaml").read_text(
        encoding="utf-8"
    )


def test_the_embedded_model_answers_a_question(installed):
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(installed.work / "slice.png")
    out = installed.vitos("ask", "nano", "slice.png", "What is the finding in the liver?\\nA. cyst\\nB. mass")
    assert "tokens kept" in out
    assert "Research use only" in out


def test_phantoms_are_made_and_evaluated_into_a_report(installed):
    installed.vitos("data", "phantom", "phantom", "--train", 2, "--val", 2, "--test", 4)
    installed.vitos("eval", "nano", "--data", "phantom/test.json", "--no-controls", "--out", "out")
    report = (installed.work / "out/report.html").read_text(encoding="utf-8")
    assert report.startswith("<!DOCTYPE html>")
    assert "vitos eval nano --data phantom/test.json" in report


def test_the_demo_is_served_with_its_script_and_style(installed):
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    port = free_port()
    page = installed.served(f"http://127.0.0.1:{port}/", "demo", "--port", port)
    for name in ("demo.js", "demo.css"):
        text = (ROOT / "src/vitos/serve/demo" / name).read_text(encoding="utf-8")
        assert json.dumps(text.splitlines()[0]).strip('"') in page


def test_an_editable_install_reads_the_recipes_of_the_repository(tmp_path):
    code = f"import hatchling.build; print(hatchling.build.build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=ROOT).strip().splitlines()[-1]
    editable = install(tmp_path / name, tmp_path / "installed")
    code = "import vitos, vitos.config.shipped as s; print(vitos.__file__); print(s.shipped_folder())"
    out = run(editable.folder / "bin/python", "-c", code, cwd=editable.work, TRACE_FILE=os.devnull)
    assert out.splitlines() == [str(ROOT / "src/vitos/__init__.py"), str(RECIPES)]
