"""What `small` is trained on is true of its pictures, and its training can be stopped and gone on with."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.backbones.family import stand_in_tokenizer
from tests.driven import up_to
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from vitos.backbones.llava import Llava
from vitos.core.record import parse_options
from vitos.data.readers import read_records
from vitos.nano import small
from vitos.nano.real import load_vision
from vitos.policy.locate import resolve_model_path
from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import add_adapters
from vitos.rl.lessons import pack_lessons

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SETS = ("brain_tumor_mri", "blood_cells", "nuclei", "fundus", "red_cells", "vqa_rad")
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
needs_data = pytest.mark.skipif(not all((DATA / s).is_dir() for s in SETS), reason=f"{DATA} is not on this machine")


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make_small.py --share 0.01` writes: some sixty pictures."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from small.data import write_data

    out = tmp_path_factory.mktemp("small")
    write_data(DATA, out, seed=3, share=0.01)
    yield out
    sys.path.remove(str(ROOT / "scripts"))


def test_options_hold_the_truth_under_another_name():
    from small.rows import Asker
    from small.words import NAMES, Words

    asker = Asker({}, Words(np.random.default_rng(0)))
    concepts = ("meningioma", "glioma", "pituitary tumour")
    seen = Counter()
    for _ in range(300):
        row = asker.choose("t", "Which?", concepts, "glioma", [], "a glioma")
        options = parse_options(row["question"])
        assert len(options) == 3
        assert options[row["answer"]] in NAMES["glioma"][:-1]  # the last name is for the probe alone
        assert ("letter" in row["question"]) == (row["meta"]["form"] == "letter")
        seen[row["answer"]] += 1
    assert min(seen.values()) > 60  # no letter is favoured


def test_names_that_are_held_out_are_never_drawn_in_training():
    from small.words import NAMES, PHRASES, Words

    rng = np.random.default_rng(0)
    for concept, names in NAMES.items():
        drawn = {Words(rng).name(concept) for _ in range(100)}
        assert drawn == set(names[:-1]), concept
        assert Words(rng, held_out=True).name(concept) == names[-1]
        assert len({name.casefold() for name in names}) == len(names)
    for key, phrases in PHRASES.items():
        assert phrases[-1] not in {Words(rng).phrase(key) for _ in range(100)}


def test_a_place_is_where_the_finding_is():
    from nano_real.scenes import Scene
    from small.rows import Asker
    from small.words import NAMES, Words

    asker = Asker({}, Words(np.random.default_rng(1)))
    concept = {name: key for key in ("left", "right", "upper", "lower", "upper left") for name in NAMES[key]}
    scene = Scene("fundus", (("optic disc", (0.1, 0.2, 0.2, 0.3)),), frozenset({"optic disc", "haemorrhage"}))
    rows = [row for _ in range(60) if (row := asker.place(scene)) is not None]
    said = {concept[parse_options(row["question"])[row["answer"]]] for row in rows}
    assert said == {"left", "upper", "upper left"}
    for _ in range(60):
        if (row := asker.present(scene)) is not None:
            answer = parse_options(row["question"]).get(row["answer"], row["answer"])
            thing_there = row["meta"]["thought"].startswith("an optic disc")
            assert (answer in NAMES["yes"]) == thing_there == ("bbox" in row)


@needs_data
def test_the_records_are_valid_and_of_train_images_alone(folder):
    records = read_records(folder / "train.json")
    order = json.loads((folder / "scenes.json").read_text())
    assert len(order["images"]) == len(order["scenes"]) == len({r.image_paths for r in records})
    templates = Counter(record.meta["template"] for record in records)
    assert {"tumour_type", "cell_type_at_point", "at_point", "caption", "radiology", "find", "modality"} <= set(
        templates
    )
    names = " ".join(str(path) for record in records for path in record.image_paths)
    held_out = json.loads((DATA / "vqa_rad" / "heldout_images.json").read_text())
    assert not [name for name in held_out if f"-{Path(name).stem}." in names]
    for record in records:
        assert record.meta["form"] in ("text", "letter")
        if record.kind == "letter":
            assert record.answer in record.options
    val = read_records(folder / "val.json")
    assert len(val) == 246


@needs_data
def test_it_is_the_same_for_a_seed(folder, tmp_path):
    from small.data import write_data

    write_data(DATA, tmp_path, seed=3, share=0.01)
    for name in ("train.json", "probe.json", "scenes.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(folder, tmp_path):
    """`start()`: a tiny untrained model with its task; always the same. Features are noise."""
    from small.lessons import read_pictures
    from small.projector import ALL_KINDS, CellTask, start_rows

    count = len(json.loads((folder / "scenes.json").read_text())["images"])
    if not (folder / "features.npy").is_file():
        np.save(folder / "features.npy", np.random.default_rng(0).normal(size=(count, 256, 768)).astype(np.float16))
    pictures = read_pictures(folder)

    def make():
        tokenizer = stand_in_tokenizer(SPECIAL, [], small.CHAT_TEMPLATE)
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True,
                max_position_embeddings=8192, **sizes,
            )
        )  # fmt: skip
        tower = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, mlp_ratio=1))
        model, processor = small.build_small(tower, language, tokenizer)
        from make_small import SPEC

        policy = SparseVLM(Llava(model, tokenizer, processor), SPEC)
        rows = model.get_input_embeddings().weight
        old = rows[: -small.new_tokens()].detach()
        task = CellTask(old, [tokenizer(kind)["input_ids"] for kind in ALL_KINDS])
        start_rows(rows.detach()[len(old) :], old, tokenizer, task)
        return policy, task, pictures

    return make


def trained(run, steps):
    from itertools import islice

    return [figures["loss"] for figures in islice(run.updates(), steps)]


@needs_data
def test_a_run_that_was_stopped_goes_on_where_it_was(start, tmp_path):
    from dataclasses import replace

    from small.train import Plan, Run

    plan = Plan(minutes=1e4, projector_share=0.0, pictures=2, soups=0, rank=2)  # soups need more scenes
    policy, task, pictures = start()
    old = policy.backbone.model.get_input_embeddings().weight[: -small.new_tokens()].detach().clone()
    whole = Run(policy, task, pictures, plan, tmp_path / "whole")
    trained(whole, 1)
    whole.seconds = 500.0  # rates depend on the time that has passed
    whole.save()
    (tmp_path / "whole").rename(tmp_path / "half")
    told = trained(whole, 2)
    again = Run(*start(), plan, tmp_path / "half")
    assert (again.step, again.seconds) == (1, 500.0)
    with pytest.raises(ValueError, match="trained with rank 2, not 3"):
        Run(*start(), replace(plan, rank=3), tmp_path / "half")
    assert trained(again, 1) == pytest.approx(told[:1], rel=1e-6)
    assert torch.equal(policy.backbone.model.get_input_embeddings().weight[: len(old)], old)  # only new rows move


@needs_data
def test_it_learns_and_what_ships_answers_the_same(start, tmp_path):
    """A few pictures by heart; then the shipped part on a fresh base gives the loss of the adapted model."""
    from dataclasses import replace

    from small.train import Plan, Run

    from vitos.nano.small import add_shipped

    policy, task, pictures = start()
    few = replace(pictures, features=pictures.features[:3], scenes=pictures.scenes[:3], records=pictures.records[:3])
    rates = {"adapter_rate": 1e-2, "projector_rate": 5e-3, "row_rate": 1e-2}
    run = Run(policy, task, few, Plan(minutes=1e4, projector_share=0.0, pictures=3, soups=0, **rates), tmp_path)
    run.seconds = 0.04 * 60e4  # behind the rise of the rates
    run.teacher.asked = 2  # the tokenizer of bytes makes long texts
    losses = trained(run, 16)
    assert np.mean(losses[-3:]) < 0.93 * np.mean(losses[:3])
    fresh, _, _ = start()
    add_shipped(fresh.backbone.model, run.weights())
    packed = pack_lessons(policy.backbone, run.teacher.batch(1, 3, ()).lessons)
    run.decoder.refresh()
    ours, _ = run.decoder.loss(packed)
    with torch.no_grad():
        theirs = packed.loss(fresh.engine, range(3))
    assert float(ours.detach()) == pytest.approx(float(theirs), rel=0.02)  # bfloat16


@needs_data
@pytest.mark.parametrize("kept", [False, True])
def test_the_fast_way_has_the_loss_and_the_gradients_of_the_library(start, kept):
    """In float32, with PEFT's adapters on the library's model: whole images, or kept tokens."""
    from peft import LoraConfig
    from small.forward import Decoder
    from small.lessons import Teacher

    policy, _, pictures = start()
    torch.manual_seed(1)
    model = policy.backbone.model
    decoder = Decoder(model, small.new_tokens(), 3, policy.backbone.banned_token_ids, torch.float32)
    add_adapters(policy, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    named = dict(model.named_parameters())
    for name, (first, second) in decoder.adapters().items():
        torch.nn.init.normal_(second, std=0.05)
        for own, kind in ((first, "A"), (second, "B")):
            named[f"{name}.lora_{kind}.default.weight"].data.copy_(own)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    teacher = Teacher(policy.backbone, pictures, policy.spec, full=0.0 if kept else 1.0, asked=3)

    def packed():
        batch = teacher.batch(5, 3, ())
        return batch.tokens, pack_lessons(policy.backbone, batch.lessons, 2.0)

    seen, lessons = packed()
    theirs = lessons.loss(policy.engine, range(3))
    theirs.backward()
    expected = {"rows": embeddings.grad[-small.new_tokens() :], "tokens": seen.grad}
    seen, lessons = packed()
    decoder.refresh()
    ours, looks = decoder.loss(lessons)
    assert looks is None
    ours.backward()
    decoder.give_back()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    given = {"rows": decoder.rows.grad, "tokens": seen.grad}
    for name, pair in decoder.adapters().items():
        for own, kind in zip(pair, "AB", strict=True):
            expected[f"{name}.{kind}"] = named[f"{name}.lora_{kind}.default.weight"].grad
            given[f"{name}.{kind}"] = own.grad
    for name, value in expected.items():
        torch.testing.assert_close(
            given[name], value, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_data
@pytest.mark.parametrize("full", [0.0, 1.0])
def test_looking_is_the_attention_of_the_library(start, monkeypatch, full):
    """What the watched heads give to the evidence, in the unmodified model, one exercise at a time."""
    from small import forward
    from small.lessons import Teacher

    monkeypatch.setattr(forward, "WATCHED", (1,))
    policy, _, pictures = start()
    decoder = forward.Decoder(
        policy.backbone.model, small.new_tokens(), 2, policy.backbone.banned_token_ids, torch.float32
    )
    decoder.refresh()
    batch = Teacher(policy.backbone, pictures, policy.spec, full=full, asked=3).batch(5, 3, ())
    packed = pack_lessons(policy.backbone, batch.lessons, 2.0)
    _, looks = decoder.loss(packed, batch.evidence)
    language = policy.backbone.model.model.language_model
    language.set_attn_implementation("eager")
    vocabulary = {index: token for token, index in policy.backbone.tokenizer.get_vocab().items()}
    given = []
    for prompt, rows, evidence in zip(packed.prompts, packed.rows, batch.evidence, strict=True):
        assert evidence.shape == (len(rows), int(prompt.is_visual.sum()))
        for row, mask in zip(rows, evidence, strict=True):
            if not mask.any():
                continue
            states = language.embed_tokens(torch.cat([prompt.input_ids, row.ids]))
            visual = torch.cat([prompt.is_visual, torch.zeros(len(row.ids), dtype=torch.bool)])
            states = states.masked_scatter(visual[:, None], prompt.embeddings)[None]
            places = torch.cat([prompt.position_ids[0], prompt.next_position + torch.arange(len(row.ids))])
            with torch.no_grad():
                out = language(inputs_embeds=states, position_ids=places[None], output_attentions=True)
            heads = out.attentions[1][0, ::2]  # (groups, T, T): the first of two that share keys
            numbered = [i for i in range(row.asked) if re.fullmatch(r"\d\.\d\d", vocabulary[int(row.ids[i])])]
            first = numbered[-1] if numbered else row.asked - 1
            seen = heads[:, len(prompt) + first : -1][..., visual.nonzero()[mask, 0]].sum(-1)
            given.append(-(seen + forward.LEAST).log().flatten())
    assert len(given) > 2
    assert float(looks.detach()) == pytest.approx(float(torch.cat(given).mean()), rel=1e-4)
    assert float(decoder.looks(packed, batch.evidence).detach()) == pytest.approx(float(looks.detach()), rel=1e-6)


def soup_of(backbone):
    """Random tokens in random cells, with a question about the point in the middle of each."""
    from nano_real.look import point_text
    from nano_real.projector import GRID

    from vitos.core.prompt import VisualTokens
    from vitos.rl.lessons import Exercise, Lesson

    cells = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:6].sort().values
    kept = torch.zeros(256, dtype=torch.bool)
    kept[cells] = True
    points = [GRID.centres()[c] for c in cells.tolist()]
    asked = [Exercise(point_text(*point), " yes") for point in points] + [Exercise("<image>Anything else?", " no")]
    width = backbone.model.config.text_config.hidden_size
    tokens = torch.randn(256, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return Lesson((VisualTokens(tokens, GRID, resized=(224, 224)),), tuple(asked), (kept,))


@needs_data
def test_a_soup_is_told_the_cell_of_each_point(start):
    from small.lessons import _asked

    policy, _, _ = start()
    told = _asked(soup_of(policy.backbone))
    assert torch.equal(told[:6], torch.eye(6, dtype=torch.bool))  # its tokens are shown in the order of its points
    assert not told[6].any()


@needs_data
def test_looking_comes_first_and_moves_neither_projector_nor_clock(start, monkeypatch, tmp_path):
    from small import forward
    from small.train import Plan, Run

    monkeypatch.setattr(forward, "WATCHED", (1,))
    policy, task, pictures = start()
    plan = Plan(
        minutes=1e4, projector_share=0.0, pictures=2, soups=0, rank=2, look_steps=25, look_rate=2e-2, attend=0.3
    )
    run = Run(policy, task, pictures, plan, tmp_path)
    monkeypatch.setattr(run.teacher.soups, "lesson", lambda size: soup_of(policy.backbone))
    run.teacher.asked = 2
    before = run.projector.linear_1.weight.detach().clone()
    updates = run.updates()
    looked = [next(updates) for _ in range(25)]
    assert np.mean([row["looks"] for row in looked[-3:]]) < 0.9 * looked[0]["looks"]
    assert not any("loss" in row for row in looked)
    assert run.seconds == 0
    assert torch.equal(run.projector.linear_1.weight, before)
    after = next(updates)
    assert after["loss"] > 0
    assert run.seconds > 0


@needs_data
def test_the_projector_learns_its_own_task(start):
    from small.projector import CONTENT_RMS, GAIN, train_projector

    policy, task, pictures = start()
    projector = policy.backbone.model.model.multi_modal_projector
    told = []
    few = [scene for scene in pictures.scenes if scene is not None][:2]  # noise can only be learned by heart
    train_projector(projector, task, pictures.features[:2], few, 60, lambda *row: told.append(row[2]), batch=2)
    assert np.mean(told[-5:]) < 0.7 * np.mean(told[:3])
    across = task.directions[:, :16]
    tokens = projector(torch.from_numpy(pictures.features[:2].astype(np.float32)))
    rest = tokens - tokens @ across @ across.T
    assert float(rest.detach().square().mean().sqrt()) == pytest.approx(GAIN * CONTENT_RMS, rel=0.3)


@needs_data
@pytest.mark.slow
def test_the_whole_script_makes_a_model_that_loads(tmp_path, monkeypatch):
    """Each step, with tiny random models in the place of SmolLM2 and DINOv2; stopped once and gone on with."""
    import make_small

    tokenizer = stand_in_tokenizer(SPECIAL, [], small.CHAT_TEMPLATE)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **text)).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    tower = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "mlp_ratio": 1, "image_size": 224}
    Dinov2Model(Dinov2Config(**tower)).save_pretrained(tmp_path / "vision")
    BitImageProcessorPil().save_pretrained(tmp_path / "vision")
    monkeypatch.setenv(small.LANGUAGE_VARIABLE, str(tmp_path / "language"))
    monkeypatch.setenv(small.VISION_VARIABLE, str(tmp_path / "vision"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "shipped"
    words = (
        f"--work {tmp_path}/work --data {DATA} --vision {tmp_path}/vision --share 0.004 --projector-steps 3 --seed 1"
    )
    words += f" --soups 0 --look-steps 0 --pictures 2 --looked-at 3 --threads 1 --minutes 0.02 --out {out}"
    for only in ("--only projector", ""):
        monkeypatch.setattr(sys, "argv", ["make_small.py", *words.split(), *only.split()])
        make_small.main()
    assert "| accuracy, all tokens |" in (out / "README.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "work/train-1/figures.jsonl").read_text().splitlines()]
    assert {"dense", "sparse", "iou", "option", "unknown", "unknown_option"} <= set(rows[-1])
    monkeypatch.setattr(small, "SMALL_PATH", out)
    monkeypatch.setattr("vitos.policy.locate.SMALL_PATH", out)
    policy = SparseVLM.from_pretrained("small")
    assert policy.spec.answer_with == "text"
    assert json.loads((resolve_model_path("small") / "processor_config.json").read_text())["image_token"]
    record = read_records(tmp_path / "work/data/val.json")[0]
    assert policy.ask(policy.encode(record.image_paths[0]), record.question, limits=up_to(8)).kept_ratio > 0


def test_loading_the_encoder_names_the_model():
    with pytest.raises(OSError, match="small needs the vision encoder"):
        load_vision("/nowhere/dinov2", "small")
