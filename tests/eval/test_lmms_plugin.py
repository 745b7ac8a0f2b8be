"""The plug-in model of lmms-eval: against `SparseVLM` itself, and through lmms-eval's own runner on its task SLAKE.

lmms-eval is an extra with some 150 packages, so these tests are skipped where it is not installed.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.eval.datasets import releases

from vitos.core.geometry import WHOLE_IMAGE
from vitos.core.response import read_answer_text
from vitos.core.sparsify import select
from vitos.engines.base import Sampling
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

lmms_eval = pytest.importorskip("lmms_eval", reason="the extra lmms-eval is not installed")

from lmms_eval.api.instance import Instance  # noqa: E402
from PIL import Image  # noqa: E402

from vitos.eval.lmms_plugin import SparseModel, manifest, read_messages  # noqa: E402

QUESTION = "\nWhat is it?\nA. cyst\nB. nodule"


@pytest.fixture(scope="module")
def pictures():
    import io

    return [Image.open(io.BytesIO(releases.picture(n, size=(64, 48)))) for n in range(3)]


@pytest.fixture(scope="module")
def nano():
    return SparseVLM.from_pretrained("nano", device="cpu")


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return [{"role": "user", "content": content}]


def instances(docs, **kwargs):
    arguments = [
        ("", lambda doc: user(*doc), {"temperature": 0, **kwargs}, index, "t", "s") for index in range(len(docs))
    ]
    return [
        Instance(request_type="generate_until", arguments=a, idx=0, metadata={"task": "t", "doc_id": i, "repeats": 1})
        for i, a in enumerate(arguments)
    ]


def run(docs, model=None, **options):
    model = model or SparseModel("nano", max_tokens=40, device="cpu", **options)
    model.task_dict = {"t": {"s": docs}}
    return model.generate_until(instances(docs))


@pytest.mark.parametrize("tokens", ["sparse", "dense"])
def test_answers_are_those_of_the_policy(tokens, pictures, nano, caplog):
    docs = [[picture, QUESTION] for picture in pictures]
    with caplog.at_level(logging.WARNING):
        answers = run(docs, tokens=tokens, batch_size=2)
    expected, kept = [], []
    for picture in pictures:
        query = Query(nano.encode(picture), f"<image>{QUESTION}")
        ((located,),) = nano.localize([query], Sampling(40))
        boxes = located.response.boxes if tokens == "sparse" else [WHOLE_IMAGE]
        kept_tokens = select(query.grid, boxes, nano.spec.keep)
        prompt = nano.plan.prompt(nano.branches, query, kept_tokens)
        ((reasoned,),) = nano.reason([query], [prompt], Sampling(40))
        expected.append(read_answer_text(reasoned.completion.text) or "")
        kept.append(kept_tokens.ratio)
    assert answers == expected
    assert any(answers)
    assert f"3 questions: {100 * sum(kept) / 3:.1f} % of the visual tokens kept" in caplog.text


def test_lmms_eval_finds_the_model_by_its_name():
    from lmms_eval.models import get_model
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("vitos") is SparseModel
    from importlib.metadata import entry_points

    if not [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "vitos"]:
        pytest.skip("this checkout is on the path, but not installed: there is no entry point")
    assert get_model("vitos").__name__ == "SparseModel"


def test_messages(pictures):
    text, images = read_messages(
        [{"role": "system", "content": "Be kind. "}, *user(pictures[0], "<image>Q", "?")], "q"
    )
    assert text == "Be kind. <image>Q?"
    assert images[0].mode == "RGB"
    text, images = read_messages(user("first ", pictures[0], " or ", pictures[1]), "q")
    assert (text, len(images)) == ("first <image> or <image>", 2)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (user("only text"), "task, 3: has no image"),
        ([{"role": "assistant", "content": "B"}], "turn of 'assistant'"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "part of type 'video'"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://host/a.png"}]}], "part of type 'image'"),
    ],
)
def test_what_it_does_not_read_is_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        read_messages(messages, "task, 3")


def test_arguments(monkeypatch, nano, tmp_path):
    with pytest.raises(ValueError, match="tokens must be sparse or dense"):
        SparseModel("nano", tokens="some")
    with pytest.raises(ValueError, match="model_args holds budgett"):
        SparseModel("nano", budgett="1")
    nano.with_spec(plan="coarse").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"two_pass or gather here; .* has coarse"):
        SparseModel(str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        SparseModel("nano")


def test_its_own_runner_on_its_task_slake(tmp_path):
    """`python -m lmms_eval` on the task `slake_en`; only where the questions come from is changed, to a local file."""
    from datasets import Dataset, Features, Image, Value

    releases.write_slake(tmp_path, unpacked=True)
    rows = [
        row for row in json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))[:6] if row["q_lang"] == "en"
    ]
    names = ["img_name", "question", "answer", "q_lang", "answer_type", "modality", "content_type"]
    columns = {name: [row[name] for row in rows] for name in names} | {"qid": [str(row["qid"]) for row in rows]}
    columns["image"] = [str(tmp_path / "imgs" / row["img_name"]) for row in rows]
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "test.parquet")
    tasks = tmp_path / "tasks"
    shutil.copytree(Path(lmms_eval.__file__).parent / "tasks" / "slake", tasks)
    template = tasks / "_default_template_yaml"
    source = f"dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'test.parquet'}"
    template.write_text(template.read_text(encoding="utf-8").replace("dataset_path: BoKelvin/SLAKE", source))
    task = (tasks / "slake_en.yaml").read_text(encoding="utf-8").replace("task: slake_en", "task: slake_en_local")
    (tasks / "slake_en.yaml").write_text(task)
    (tasks / "slake.yaml").unlink()
    (tasks / "slake_zh.yaml").unlink()
    command = [sys.executable, "-m", "lmms_eval", "--model", "vitos", "--tasks", "slake_en_local"]
    command += ["--model_args", "pretrained=nano,max_tokens=40", "--include_path", str(tasks), "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    metrics = json.loads(results.read_text(encoding="utf-8"))["results"]["slake_en_local"]
    assert 0.0 <= metrics["slake_accuracy,none"] <= 1.0
    (samples,) = (tmp_path / "out").rglob("*_samples_slake_en_local.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 4
