"""The supervised loss against plain cross-entropy on every exercise alone; and it can be lowered."""

import copy

import pytest
import torch

from vitos.config.recipe import WarmStartSection
from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.core.response import parse_localization, parse_reasoning
from vitos.core.sparsify import Fusion
from vitos.data.images import load_image
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM
from vitos.rl.sft import Exercise, Lesson, record_lesson, supervised_loss, train_supervised, warm_start

QUESTION = "<image>What is it?\nA. cyst\nB. mass"


@pytest.fixture
def lessons(picture):
    """Several exercises about one image, two images, and a lesson without any."""
    first = (
        Exercise(f"{QUESTION}\nAnswer.", "<answer>mass and cyst</answer>"),
        Exercise("<image>List all findings.", "mass [[0.10, "),
    )
    both = (
        Exercise("<image> and <image>?", "no"),
        Exercise("<image> and <image> differ", "<think>a</think> yes it is"),
    )
    return [
        Lesson((picture(64, 40),), first),
        Lesson((picture(33, 97), picture(90, 50)), both),
        Lesson((), (Exercise("It is a cyst.", "A"), Exercise("Which option says it?", "it is a mass"))),
    ]


@pytest.mark.parametrize("answer_weight", [1.0, 7.0])
@pytest.mark.parametrize("name", ["nano", "windowed"])
def test_loss_is_cross_entropy_of_every_exercise_alone(name, answer_weight, request, lessons, hf_inputs):
    backbone = request.getfixturevalue(name)
    banned = list(backbone.banned_token_ids)
    nats, total, answers = [], 0.0, 0
    for lesson in lessons:
        for exercise in lesson.exercises:
            target = [*backbone.tokenizer(exercise.target)["input_ids"], backbone.tokenizer.eos_token_id]
            inputs = hf_inputs(backbone, exercise.text, lesson.images, extra_ids=target)
            logits = backbone.model(**inputs).logits[0, -len(target) - 1 : -1]
            logits = logits.index_fill(-1, torch.tensor(banned), float("-inf"))  # as when they are sampled
            texts = [backbone.tokenizer.decode(target[: end + 1]) for end in range(len(target))]
            said = [text.partition("<answer>")[2] for text in texts]
            answer = [end for end, text in enumerate(said) if text and "mass and cyst".startswith(text)]
            weight = torch.ones(len(target), dtype=torch.float64)
            weight[answer] = answer_weight
            nats.append(
                weight @ torch.nn.functional.cross_entropy(logits.double(), torch.tensor(target), reduction="none")
            )
            total, answers = total + weight.sum(), answers + len(answer)
    assert answers > 2
    expected = sum(nats) / total
    loss = supervised_loss(TorchEngine(backbone), lessons, answer_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    parameters = list(backbone.model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_lesson_of_some_tokens_is_scored_from_these_alone(nano, picture):
    """As if the others had never been in the prompt, at the positions of the dense one."""
    exercise = Exercise(f"{QUESTION}\nAnswer.", "<answer>B</answer>")
    (visual,) = nano.encode([picture(64, 48)])
    mask = torch.arange(visual.grid.num_tokens) % 3 == 0
    lesson = Lesson((visual,), (exercise,), kept=(mask,))
    target = torch.tensor([*nano.tokenizer(exercise.target)["input_ids"], nano.tokenizer.eos_token_id])
    engine = TorchEngine(nano)
    prompt = nano.build_prompt(exercise.text, [visual]).sparse([mask], Fusion("none"))
    expected = -engine.score([prompt], [[target]]).logprobs.mean()
    assert supervised_loss(engine, [lesson]).item() == pytest.approx(expected.item(), rel=1e-6)
    dense = supervised_loss(engine, [Lesson((visual,), (exercise,))])
    assert abs(dense.item() - expected.item()) > 1e-4


def test_lessons_whose_exercises_differ_before_the_image_are_refused(nano, picture):
    """They cannot share a prefix; silently learning the first one's would be wrong."""
    lesson = Lesson((picture(40, 40),), (Exercise("<image>A?", "A"), Exercise("Look: <image>A?", "A")))
    with pytest.raises(ValueError, match=r"differ before their last image: '<image>A\?' and 'Look"):
        supervised_loss(TorchEngine(nano), [lesson])


def fresh(backbone):
    return type(backbone)(copy.deepcopy(backbone.model).float(), backbone.tokenizer, backbone.image_processor)


def test_a_handful_of_steps_learns(nano, lessons):
    from scripts.nano_model import build_nano

    backbone, losses = build_nano(), []
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    train_supervised(backbone, [lessons] * 12, steps=12, learning_rate=3e-3, on_step=lambda *step: losses.append(step))
    assert [number for number, _ in losses] == list(range(1, 13))
    assert losses[-1][1] < 0.5 * losses[0][1]
    moved = [name for name, p in backbone.model.named_parameters() if not torch.equal(p, before[name])]
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert not backbone.model.training


def test_training_refuses(nano, lessons):
    with pytest.raises(ValueError, match="ran out after 1 of 3 steps"):
        train_supervised(fresh(nano), [lessons[2:]], steps=3, learning_rate=1e-4)
    broken = fresh(nano)
    broken.model.model.language_model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="the loss of step 1 is"):
        train_supervised(broken, [lessons[2:]], steps=1, learning_rate=1e-4)


# --- lessons of records ---------------------------------------------------------------------------------------------


def record(**changes):
    fields = {"id": "x", "image_paths": (), "question": QUESTION, "answer": "B"}
    return Record(**fields | changes)


@pytest.mark.parametrize("style", ["normalized", "absolute", "per_mille"])
def test_lesson_of_a_record(nano, picture, style):
    """What is learned reads back as the record's boxes and answer, in the style of the spec."""
    boxes = (Box(0.25, 0.5, 0.75, 1.0), Box(0.0, 0.0, 0.5, 0.25))
    image, spec = picture(128, 64), VitosSpec(coordinates=style)
    lesson = record_lesson(record(boxes=boxes, meta={"thought": "it is dense"}), [image], nano, spec)
    localize, reason = lesson.exercises
    (visual,) = nano.encode([image])
    read = parse_localization(localize.target, "AB", nano.box_reader(visual, style))
    assert (read.boxes, read.answer, read.thought, read.well_formed) == (boxes, "B", "it is dense", True)
    assert parse_reasoning(reason.target, "AB").answer == "B"
    assert localize.text == spec.localize_text(QUESTION)
    assert reason.text == spec.reason_text(QUESTION)
    assert lesson.images == (image,)


def test_a_checkpoint_may_answer_with_the_text_of_an_option(nano, picture):
    spec = VitosSpec(answer_with="text")
    localize, reason = record_lesson(record(boxes=(Box(0, 0, 0.5, 0.5),)), [picture(64, 64)], nano, spec).exercises
    assert localize.target.endswith("</evidence><answer>mass</answer>")
    assert reason.target.endswith("</think><answer>mass</answer>")
    assert parse_reasoning(reason.target, record().options).answer == "B"


def test_a_tiny_box_is_learned_as_a_box(nano, picture):
    """Narrower than a hundredth: rounded, it would have no width and teach text that does not parse."""
    image = picture(128, 64)
    lesson = record_lesson(record(boxes=(Box(0.501, 0.5, 0.504, 0.7),)), [image], nano, VitosSpec())
    (visual,) = nano.encode([image])
    assert parse_localization(lesson.exercises[0].target, "AB", nano.box_reader(visual, "normalized")).boxes


def test_without_boxes_only_the_reasoning_is_learned(nano, picture):
    (only,) = record_lesson(record(), [picture(40, 40)], nano, VitosSpec()).exercises
    assert only.target == "<think>mass</think><answer>B</answer>"


# --- the warm start of a run ----------------------------------------------------------------------------------------


def moved(nano, records, unfrozen=None, **section):
    """Names of the weights that a warm start of two updates changes."""
    backbone = fresh(nano)
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    warm_start(SparseVLM(backbone, VitosSpec()), records, WarmStartSection(steps=2, batch_size=2, **section), unfrozen)
    return {name for name, weight in backbone.model.state_dict().items() if not torch.equal(weight, before[name])}


def test_the_warm_start_trains_what_the_training_trains(nano, phantom_records):
    everything = moved(nano, phantom_records, train_encoder=True)
    most = moved(nano, phantom_records)
    assert most == {name for name in everything if "visual" not in name}
    assert most < everything
    assert moved(nano, phantom_records, [r"layers\.1\.mlp"]) == {name for name in most if "layers.1.mlp" in name}
    both = moved(nano, phantom_records, r"layers\.1\.mlp", train_encoder=True)
    assert both == {name for name in everything if "layers.1.mlp" in name or "visual" in name}


def test_a_record_of_two_images_teaches_with_both(nano, phantom_records):
    one, other = phantom_records[:2]
    text = f"<image><image>{one.question.removeprefix('<image>')}"
    both = Record("both", (*one.image_paths[:1], *other.image_paths[:1]), text, one.answer, one.boxes, one.meta)
    assert moved(nano, [both, one])
    images = [load_image(path) for path in both.image_paths]
    lesson = record_lesson(both, images, nano, VitosSpec())
    assert lesson.images == tuple(images)
    alone = record_lesson(one, images[:1], nano, VitosSpec())
    assert [e.target for e in lesson.exercises] == [e.target for e in alone.exercises]
