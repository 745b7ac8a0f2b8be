"""A family is one file: found in the folder or by an entry point, loaded by its model type, and named in no list."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitos.backbones import BACKBONES, families, family_of, load_backbone
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine

SOURCE = Path(__file__).parents[2] / "src/vitos"
NANO = SOURCE / "nano/weights"

FAMILY = """
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vitos.backbones.base import Capabilities, VllmModel
from vitos.backbones.qwen import QwenVL


class MyConfig(Qwen2_5_VLConfig):
    model_type = "my_vl"


class MyModel(Qwen2_5_VLForConditionalGeneration):
    config_class = MyConfig


AutoConfig.register("my_vl", MyConfig)
AutoModelForImageTextToText.register(MyConfig, MyModel)


class MyVL(QwenVL):
    model_types = ("my_vl",)
    capabilities = Capabilities(several_images=True, extra_streams=False, native_coordinates="normalized")
    vllm_model = VllmModel("MyVLForVllm", "my_package.my_vllm:MyVLForVllm")
"""

USE = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoConfig
from vitos import SparseVLM
from vitos.doctor.shapes import model_shape
from vitos.engines.base import Sampling
from vitos.engines.vllm.plugin import architecture

policy = SparseVLM.from_pretrained(sys.argv[1], device="cpu")
image = Image.fromarray(np.load(sys.argv[2]))
with torch.no_grad():
    (visual,) = policy.backbone.encode([image])
dense = policy.backbone.build_prompt("<image>Which quadrant?", [visual])
sparse = dense.sparse([torch.arange(len(dense.embeddings)) % 3 == 0])
rows = policy.engine.sample([dense, sparse], Sampling(8), [[1], [2]])
print(json.dumps({
    "family": type(policy.backbone).__name__,
    "model": type(policy.backbone.model).__name__,
    "tokens": [row[0].token_ids.tolist() for row in rows],
    "vllm": architecture("my_vl"),
    "layers": model_shape(AutoConfig.from_pretrained(sys.argv[1])).layers,
}))
"""


def write_package(folder: Path, **modules: str) -> None:
    """Write an installed package `my_package` whose modules are families."""
    package, info = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    lines = "".join(f"{name} = my_package.{name}\n" for name in modules)
    (info / "entry_points.txt").write_text(f"[vitos.backbones]\n{lines}", encoding="utf-8")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(name=text, ...)`: `write_package`, for this test in this process."""

    def install(**modules):
        write_package(tmp_path, **modules)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def declared() -> dict[str, tuple[str, str]]:
    """Model type → (file, class), read from the sources without running them."""
    found = {}
    for file in (SOURCE / "backbones").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for line in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "model_types":
                    found |= dict.fromkeys(ast.literal_eval(line.value), (file.stem, node.name))
    return found


def test_the_families_are_the_files_that_name_model_types():
    expected = declared()
    assert {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "gemma3", "internvl"} <= set(expected)
    found = {name: (family.__module__.split(".")[-1], family.__name__) for name, family in families().items()}
    assert found == expected
    assert set(BACKBONES.names()) == {file for file, _ in expected.values()}


def test_no_other_file_names_a_family():
    """Except for the configs of published models, which `vitos doctor` needs without a network."""
    owners = {name: file for name, (file, _) in declared().items()}
    for file in SOURCE.rglob("*.py"):
        if file == SOURCE / "doctor/shapes.py":
            continue
        constants = {n.value for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Constant)}
        assert {name for name in owners if name in constants} <= {n for n, f in owners.items() if f == file.stem}, file


def test_the_table_of_the_documents_has_every_family():
    page = (SOURCE.parents[1] / "docs/backbone.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+`) \|", page.partition("## What a family defines")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(families())


def test_one_file_of_another_package_is_a_family(tmp_path, picture):
    """Another process finds it, loads a checkpoint with it and samples; its weights are nano's, and so are the tokens.

    The same file also serves the estimates of `vitos doctor` and the plug-in for vLLM.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    write_package(tmp_path / "site", my_vl=FAMILY)
    checkpoint = shutil.copytree(NANO, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "my_vl"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    own = load_backbone(NANO)
    # Under the model's own names: the library renames those of published files by model type.
    weights = {name: weight.clone() for name, weight in own.model.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    image = picture(90, 131)
    np.save(tmp_path / "image.npy", np.asarray(image))
    paths = os.pathsep.join([str(tmp_path / "site"), str(SOURCE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(checkpoint), str(tmp_path / "image.npy")],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])

    with torch.no_grad():
        dense = own.build_prompt("<image>Which quadrant?", own.encode([image]))
    sparse = dense.sparse([torch.arange(len(dense.embeddings)) % 3 == 0])
    rows = TorchEngine(own).sample([dense, sparse], Sampling(8), [[1], [2]])
    assert said == {
        "family": "MyVL",
        "model": "MyModel",
        "tokens": [row[0].token_ids.tolist() for row in rows],
        "vllm": "MyVLForVllm",
        "layers": own.model.config.get_text_config().num_hidden_layers,
    }
    with pytest.raises(ValueError, match=r"checkpoint.*my_vl"):
        load_backbone(checkpoint)  # not installed here


SHORT = "from vitos.backbones.llava import Llava\n\n\nclass Mine(Llava):\n    model_types = {}\n"


def test_a_family_may_extend_another_under_its_own_model_type(installed):
    installed(mine=SHORT.format('("mine", "mine_moe")'))
    found = families()
    assert found["mine"] is found["mine_moe"]
    assert found["mine"].__qualname__ == "Mine"
    assert issubclass(found["mine"], found["llava"])
    assert family_of("llava").__name__ == "Llava"


def test_two_families_with_one_model_type_are_refused_by_name(installed):
    installed(mine=SHORT.format('("other", "llava")'))
    with pytest.raises(ValueError, match=r"vitos\.backbones\.llava\.Llava and my_package\.mine\.Mine both .* 'llava'"):
        families()


def test_two_packages_with_one_model_type_are_refused_by_name(installed):
    text = SHORT.format('("one",)')
    installed(first=text, second=text)
    with pytest.raises(ValueError, match=r"my_package\.first\.Mine and my_package\.second\.Mine both .* 'one'"):
        load_backbone(NANO)


def test_an_entry_point_with_the_name_of_a_file_is_refused(installed):
    installed(llava=SHORT.format('("mine",)'))
    with pytest.raises(ValueError, match=r"'llava' .* has a name that is taken"):
        families()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT.format('"mine"'), r"my_package\.mine\.Mine: model_types must be a tuple .* got 'mine'"),
        (SHORT.format('["mine"]'), "model_types must be a tuple"),
        (SHORT.format("(1,)"), "model_types must be a tuple"),
        (SHORT.replace("    model_types = {}", "    pass"), r"my_package\.mine defines no subclass of Backbone"),
        ("from vitos.backbones.llava import Llava", r"my_package\.mine defines no subclass of Backbone"),
        ("", r"my_package\.mine defines no subclass of Backbone .* entry point \(vitos\.backbones\)"),
    ],
    ids=["text", "list", "numbers", "inherited", "imported", "empty"],
)
def test_a_file_without_model_types_is_refused(installed, text, message):
    installed(mine=text)
    with pytest.raises(ValueError, match=message):
        families()
