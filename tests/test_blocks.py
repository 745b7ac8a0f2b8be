"""Every code block of README.md and docs/ is run on nano, or says above itself why it is not.

A comment above a block, which readers of the page do not see, is the reason:

    <!-- not run: it needs a GPU -->                      the block
    <!-- not run where "lingshu-7b": 16 GB of weights --> its lines with these words

What is run, by language:

- console: what readers do once on their machine, not run.
- bash: each line of `vitos` through the command line's own entry, in this process, with the words of SHORTER behind
  it; `make` as a rehearsal (`make -n`); a script by Python. A demo ends when its page is open.
- python: all blocks of a page one after the other, as one program. A function that a later block imports from a module
  is saved as that module.
- json: read as records. yaml: read as a recipe. toml: an entry point of a group that vitos looks into.
- bibtex: compared with CITATION.cff.

Pages that another test follows are left to it (FOLLOWED). The folder that the blocks of a page run in has the files
that they name: pictures, a DICOM series, a volume, records, a model.
"""

import collections
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLLOWED = {"your-data.md": "tests/test_your_data.py"}
BLOCK = re.compile(
    r'^(?:<!-- not run(?: where "(?P<words>[^"]+)")?: (?P<reason>[^>]+) -->\n)?'
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
TRAIN = (
    "train.warmup_steps=0 train.localization_steps=1 train.reasoning_steps=1 train.questions_per_step=2 "
    "train.num_reasonings=2 "
    "train.max_localization_tokens=16 train.max_reasoning_tokens=8 evaluate.controls=false evaluate.budgets=[] "
    "evaluate.bootstrap_samples=100 "
    "data.limit_train=4 data.limit_eval=2"
)
# Words behind the words of a command: the same work on fewer questions, with fewer updates and shorter answers.
SHORTER = {
    "vitos data phantom": "--train 4 --val 2 --test 2 --overwrite",
    "vitos train": " ".join(f"--set {change}" for change in TRAIN.split()),
    "vitos distill": "--limit 4 --steps 1 --max-tokens 16 --batch-size 2 --validation 0.5",
    "vitos eval": "--limit 2 --max-tokens 16 --no-controls",
    "vitos ask": "--max-tokens 16",
    "vitos bench run": "--limit 1 --max-tokens 8 --selector random --budget 0.5",
    "vitos doctor --recipe quickstart --probe": "--probe 2",
}
# The same for Python.
SHORTER_CODE = {
    "DualStreamConfig(": "DualStreamConfig(localization_steps=1, reasoning_steps=1, questions_per_step=2, "
    "num_localizations=2, num_reasonings=2, max_localization_tokens=16, max_reasoning_tokens=8, use_cpu=True, "
    "report_to='none', disable_tqdm=True, ",
}
COUNTS: collections.Counter[str] = collections.Counter()


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block; `reason` says why it, or its lines with `words`, are not run."""

    language: str
    text: str
    reason: str | None
    words: str | None


def blocks(page: Path) -> list[CodeBlock]:
    text = page.read_text(encoding="utf-8")
    found = [CodeBlock(m["language"], m["text"], m["reason"], m["words"]) for m in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^```\w+$", text, re.MULTILINE)), f"{page.name}: a block is not closed"
    assert text.count("<!-- not run") == sum(block.reason is not None for block in found), "a reason without a block"
    return found


# --- the files that the pages name ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all files that blocks name; each page gets a copy."""
    nibabel, dicom = pytest.importorskip("nibabel"), pytest.importorskip("tests.data.test_series")
    from tests.eval.datasets.releases import write_slake

    from vitos.data.boxed import convert_boxed
    from vitos.data.convert import convert
    from vitos.data.phantom import write_phantoms
    from vitos.nano import NANO
    from vitos.policy.locate import resolve_model_path

    folder = tmp_path_factory.mktemp("blocks") / "work"
    for split, count in (("train", 24), ("val", 2), ("test", 2)):  # 24: one update of the quickstart
        write_phantoms(folder / "my-data", split, count)
    shutil.copytree(folder / "my-data", folder / "runs/phantom")
    shutil.copytree(folder / "my-data", folder / "runs/phantoms")
    shutil.copy(folder / "my-data/test.json", folder / "test.json")
    shutil.copytree(folder / "my-data/images", folder / "images")
    picture = Image.open(next((folder / "my-data/images").rglob("*.png")))
    for name in ("slice", "before", "after", "1", "0001"):
        picture.save(folder / f"{name}.png")
    for name in ("images", "my-data/images"):
        picture.save(folder / name / "0001.png")
    for number in range(40):
        dicom.write_slice(_made(folder / "ct/series3"), f"{number:02}.dcm", number)
    values = np.random.default_rng(0).integers(0, 80, (16, 16, 44)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "ct.nii.gz")
    for name in ("runs/quickstart/model", "runs/mine/model"):
        shutil.copytree(resolve_model_path(NANO), folder / name)
    convert(folder / "my-data", folder / "shards", to="parquet")
    for name in ("slake", "SLAKE"):
        write_slake(_made(folder / "downloads" / name))
    (_made(folder / "models/HuatuoGPT-Vision-7B-hf") / "config.json").write_text("{}")
    convert_boxed(folder / "my-data/train.json", folder / "coco", None, "coco")
    convert_boxed(folder / "my-data/train.json", folder / "yolo", None, "yolo")
    mask = np.zeros((128, 128), np.uint8)
    mask[20:40, 20:50] = 255
    Image.fromarray(mask).save(_made(folder / "masks/mass") / "0001.png")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def world(files, tmp_path, monkeypatch):
    """The current folder: a copy of `files`, with nothing that only a hub or a browser could give."""
    work = tmp_path / "work"
    shutil.copytree(files, work, symlinks=True)
    shutil.copytree(ROOT / "recipes", work / "recipes")
    if SHARED.is_dir():
        (tmp_path / "shared").symlink_to(SHARED)
        monkeypatch.setenv("VITOS_DINOV2", str(SHARED / "models/dinov2-small"))
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(work))
    yield work
    sys.modules.pop("my_rewards", None)


# --- how each language is run ---------------------------------------------------------------------------------------


def run_bash(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
    elif words[0] == "python":
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        command = [sys.executable, str(ROOT / words[1]), *words[2:]]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    else:
        run_vitos([word.removeprefix(".venv/bin/") for word in words], monkeypatch)


def run_vitos(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command in this process; a doctor may say that something is missing here (exit code 1)."""
    assert words[0] == "vitos"
    if words[1] == "demo":
        page = pytest.importorskip("vitos.serve.demo.page")
        real, here = page.launch, {"block": False, "port": None}  # another test may have the port
        with monkeypatch.context() as patch:
            patch.setattr(page, "launch", lambda *args, **more: real(*args, **more | here)[0].close())
            run_command(words)
    else:
        run_command(words)


def run_command(words: list[str]) -> None:
    from typer.main import get_command

    from vitos.cli.main import app

    more = [extra for start, extra in SHORTER.items() if " ".join(words).startswith(start)]
    words = [*words, *shlex.split(" ".join(more))]
    code = get_command(app).main(words[1:], prog_name="vitos", standalone_mode=False)
    assert code in ((0, 1, None) if words[1] == "doctor" else (0, None)), f"{words}: exit code {code}"


def run_python(text: str, names: dict[str, object], later: str) -> None:
    """Run a block with the names of the page's earlier ones."""
    for module, function in re.findall(r"^from (\w+) import (\w+)$", later, re.MULTILINE):
        if f"\ndef {function}(" in text:
            Path(f"{module}.py").write_text(text, encoding="utf-8")
    for word, shorter in SHORTER_CODE.items():
        text = text.replace(word, shorter)
    exec(compile(text, "block", "exec"), names)


def run_json(text: str) -> None:
    from vitos.data.readers import read_records

    with contextlib.suppress(json.JSONDecodeError):
        json.loads(text)
        text = text if text.startswith("[") else f"[{text}]"
    file = Path("block.json" if text.startswith("[") else "block.jsonl")
    file.write_text(text, encoding="utf-8")
    assert read_records(file)


def run_yaml(text: str) -> None:
    from vitos.config.recipe import load_recipe

    required = {"name": "x", "output_dir": "x", "data": {"train": "x.json"}}
    Path("block.yaml").write_text(yaml.safe_dump(required | yaml.safe_load(text)), encoding="utf-8")
    load_recipe("block.yaml")


def run_toml(text: str) -> None:
    groups = tomllib.loads(text)["project"]["entry-points"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/vitos").rglob("*.py"))
    assert groups
    assert [group for group in groups if f'"{group}"' not in source] == []


def run_bibtex(text: str) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"][0]
    flat = " ".join(text.split())
    assert cited["title"] in flat
    assert all(f"{author['family-names']}, {author['given-names']}" in flat for author in cited["authors"])


# --- the test -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, world, monkeypatch, capsys):
    found = blocks(page)
    if page.name == "nano-real.md" and not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not on this machine")
    with contextlib.ExitStack() as stack:
        if page.name == "training.md":  # its first block trains the quickstart
            shutil.rmtree("runs/quickstart")
        if page.name == "data.md":
            monkeypatch.setattr("datasets.load_dataset", local_hub())
        address = stack.enter_context(a_server()) if page.name == "serve.md" else ""
        names: dict[str, object] = {"__name__": "block"}
        for index, block in enumerate(found):
            later = "\n".join(other.text for other in found[index + 1 :])
            text = block.text.replace("http://127.0.0.1:8000", address) if address else block.text
            if page.name in FOLLOWED:
                COUNTS["followed by another test"] += 1
            elif block.language == "console" or (block.reason and not block.words):
                COUNTS["not run, with a reason"] += 1
            else:
                run_block(block, text, names, later, monkeypatch)
                COUNTS["run"] += 1
    with capsys.disabled():
        print(f" {page.name}: {len(found)} blocks; so far {dict(COUNTS)}")


def run_block(
    block: CodeBlock, text: str, names: dict[str, object], later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.language == "bash":
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        left = [line for line in lines if not block.words or block.words not in line]
        assert block.words is None or len(left) < len(lines), f"no line has {block.words!r}"
        for line in left:
            run_bash(line, monkeypatch)
    elif block.language == "python":
        run_python(text, names, later)
    else:
        {"json": run_json, "yaml": run_yaml, "toml": run_toml, "bibtex": run_bibtex}[block.language](text)


def local_hub():
    """`datasets.load_dataset` for a hub that has one set, the shards of the current folder."""
    import datasets

    real, shards = datasets.load_dataset, {"train": str(Path("shards").resolve() / "train-*.parquet")}

    def load(name: str, *, streaming: bool):
        assert name == "owner/name"
        return real("parquet", data_files=shards, streaming=streaming)

    return load


@contextlib.contextmanager
def a_server():
    """The address of a server of nano that wants the page's token."""
    conftest = pytest.importorskip("tests.serve.api.conftest")
    from vitos.policy.vlm import SparseVLM

    with conftest.running(SparseVLM.from_pretrained("nano"), token="a-secret") as address:
        yield address


@pytest.mark.slow
def test_a_block_that_does_not_work_fails(world, monkeypatch):
    wrong = [
        ("bash", "vitos ask nano no-such.png 'What is it?'"),
        ("python", "from vitos import Nothing"),
        ("json", '[{"image_path": ["no-such.png"], "question": "?", "answer": "A"}]'),
        ("yaml", "trian: {}"),
        ("toml", '[project.entry-points."vitos.nothing"]\nx = "y"'),
        ("bibtex", "@inproceedings{x}"),
    ]
    for language, text in wrong:
        with pytest.raises((Exception, SystemExit)):
            run_block(CodeBlock(language, text, None, None), text, {}, "", monkeypatch)
    assert blocks(ROOT / "docs/data.md")
