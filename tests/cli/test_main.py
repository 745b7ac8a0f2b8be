"""Verbs from a shell: version, help, `ask`, and what a dry run refuses."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitos.cli.answer import answer_json, answer_table
from vitos.cli.main import app
from vitos.core.version import __version__
from vitos.data.phantom import write_phantoms

QUESTION = "What is the finding?\nA. cyst\nB. mass"


def vitos(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option):
    assert vitos(option).stdout == f"vitos {__version__}\n"


@pytest.mark.parametrize("verb", ["train", "eval", "ask", "demo", "serve", "doctor", "data", "bench", "recipes"])
def test_help_by_its_short_name(verb):
    result = vitos(verb, "-h")
    assert result.exit_code == 0
    assert result.stdout == vitos(verb, "--help").stdout
    assert "Usage:" in result.stdout


def test_completion_is_offered():
    assert "--install-completion" in vitos("--help").stdout


def test_ask_as_json_is_one_line_that_agrees_with_the_library(tmp_path):
    from vitos import SparseVLM, read_records
    from vitos.core.geometry import Box

    (record, *_) = read_records(write_phantoms(tmp_path, "test", 1))
    question, (image,) = record.question.removeprefix("<image>"), record.image_paths
    result = vitos("ask", "nano", image, question.replace("\n", "\\n"), "--json", "--box", "0,0,0.5,0.5")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    vlm = SparseVLM.from_pretrained("nano", device="cpu")
    finding = vlm.ask(vlm.encode(Image.open(image)), question, boxes=[Box(0, 0, 0.5, 0.5)])
    assert (found["answer"], found["kept_tokens"], found["visual_tokens"]) == (finding.answer, 16, 64)
    assert found["written"] == finding.reasoning.response.text
    assert finding.answer is not None
    assert found["answer_text"] == f"{finding.answer}. {record.options[finding.answer]}"


@pytest.fixture
def unread():
    """An answer that could not be read, with brackets that rich would take for its markup."""
    import dataclasses

    from vitos import SparseVLM

    vlm = SparseVLM.from_pretrained("nano", device="cpu")
    finding = vlm.ask(vlm.encode(Image.new("RGB", (128, 128))), QUESTION)
    response = dataclasses.replace(finding.reasoning.response, text="[bold]hm[/bold]", answer=None, thought=None)
    reasoning = dataclasses.replace(finding.reasoning, response=response)
    return dataclasses.replace(finding, answer=None, thought=None, reasoning=reasoning)


def test_what_could_not_be_read_is_shown_as_it_was_written(unread, capsys):
    from rich.console import Console

    Console(width=100).print(answer_table(unread, QUESTION, "PNG", ""))
    shown = capsys.readouterr().out
    assert "no answer could be read" in shown
    assert "[bold]hm[/bold]" in shown
    found = json.loads(answer_json(unread, QUESTION, "PNG"))
    assert (found["answer"], found["answer_text"], found["written"]) == (None, None, "[bold]hm[/bold]")


# --- dry run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """`dry(*settings)`: a dry run of the quickstart on twelve phantom questions."""
    monkeypatch.chdir(tmp_path)
    data = write_phantoms(tmp_path, "train", 12)
    settings = [f"data.train=[{data}]", f"data.eval=[{data}]", "output_dir=run", "train.questions_per_step=4"]

    def make(*more):
        return vitos("train", "quickstart", "--dry-run", *(word for s in (*settings, *more) for word in ("--set", s)))

    return make


def test_a_dry_run_of_what_can_run_prints_the_recipe(dry, tmp_path):
    result = dry()
    assert result.exit_code == 0
    assert "questions_per_step: 4" in result.stdout
    assert "images were not opened" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.questions_per_step=16", "12 training questions do not fill one update of 16"),
        ("train.unfrozen_parameters=nothing_like_it", "'nothing_like_it' is in the name of no weight"),
        ("trainer.no_such_field=1", "trainer.no_such_field is not a field"),
        ("rewards.extra=[{function: 'gone.py:mine', weight: 1.0}]", "gone.py"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(dry, setting, message):
    result = dry(setting)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert result.stdout == ""


def test_a_dry_run_refuses_the_folder_of_another_run(dry, tmp_path):
    from vitos import SparseVLM
    from vitos.rl.checkpoint import staged_folder

    with staged_folder(tmp_path / "run/model") as folder:
        SparseVLM.from_pretrained("nano", device="cpu").save_pretrained(folder)
    assert "holds a run" in str(dry().exception)


def test_a_dry_run_says_what_it_could_not_check(dry):
    result = dry("data.train=[elsewhere.json]", "train.bf16=true")
    assert result.exit_code == 0
    assert "Not checked, since it is not here or not a file: elsewhere.json" in result.stderr
    assert "train.bf16 computes on a GPU" in result.stderr
