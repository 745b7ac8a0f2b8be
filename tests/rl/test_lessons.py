"""Lessons: the loss against plain cross-entropy on every exercise alone, and what is learned of a record."""

from dataclasses import replace

import pytest
import torch
from tests.backbones.families import FAMILIES
from tests.backbones.family import library_inputs

from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.core.response import parse_localization, parse_reasoning
from vitos.core.sparsify import Fusion
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.spec import VitosSpec
from vitos.rl.lessons import Exercise, Lesson, pack_lessons, packed_lessons, record_lesson, supervised_loss

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


# --- lessons of records ----------------------------------------------------------------------------------------------


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


def test_words_and_texts_are_learned_as_they_are(nano, picture):
    for kind, answer in (("word", "left lung"), ("text", "A mass in the left lung.")):
        asked = record(question="<image>Where is it?", answer=answer, kind=kind)
        (only,) = record_lesson(asked, [picture(40, 40)], nano, VitosSpec()).exercises
        assert only.target == f"<think>{answer}</think><answer>{answer}</answer>"
        assert only.text == VitosSpec().reason_text(asked.question, kind)


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_questions_that_share_an_image_are_learned_as_the_unmodified_model_learns_each(family, picture):
    """Three questions behind one image, one about another: the library's loss of four prompts, and its gradient."""
    backbone = family.backbone()
    texts = ["<image>What is it?", "<image>Where is the mass, and is it large?", "<image>cyst"]
    targets = ["<answer>mass</answer>", "it is a cyst", "<think>no</think><answer>yes it is</answer>"]
    images = [picture(*size) for size in family.sizes[:2]]
    exercises = tuple(map(Exercise, texts, targets))
    lessons = [Lesson((images[0],), exercises), Lesson((images[1],), exercises[:1])]
    loss = pack_lessons(backbone, lessons).loss(TorchEngine(backbone), [0, 1])
    nats, count = 0.0, 0
    for lesson in lessons:
        for exercise in lesson.exercises:
            ids = [*backbone.tokenizer(exercise.target, add_special_tokens=False)["input_ids"]]
            ids.append(backbone.tokenizer.eos_token_id)
            inputs = library_inputs(family.processor(), exercise.text, lesson.images, ids)
            logits = backbone.model(**inputs).logits[0, -len(ids) - 1 : -1]
            logits = logits.index_fill(-1, torch.tensor(backbone.banned_token_ids), float("-inf"))
            nats = nats + torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
            count += len(ids)
    assert loss.item() == pytest.approx(float(nats.detach()) / count, rel=1e-5)
    weights = [p for n, p in backbone.model.named_parameters() if "mlp" in n and "visual" not in n and p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (loss, nats / count))
    compared = 0
    for got, wanted in zip(ours, theirs, strict=True):
        if got is not None and wanted is not None and wanted.any():
            assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
            compared += 1
    assert compared


def test_parts_of_a_batch_add_up_to_its_loss(nano, lessons):
    engine = TorchEngine(nano)
    packed = pack_lessons(nano, lessons, answer_weight=5.0)
    whole = packed.loss(engine, range(3))
    parts = [packed.loss(engine, part, packed.weight) for part in ([0], [2, 1])]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)
    assert packed.learned == sum(len(nano.tokenizer(e.target)["input_ids"]) + 1 for x in lessons for e in x.exercises)


def test_lessons_about_the_same_images_are_packed(nano, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    exercise = Exercise("<image>What?", "mass")
    records = [record(id=str(i), image_paths=paths) for i, paths in enumerate([(a,), (b,), (a,), (a, b), (), ()])]
    lessons = [Lesson((), (replace(exercise, target=str(i)),)) for i in range(6)]
    told = [[e.target for e in lesson.exercises] for lesson in packed_lessons(records, lessons)]
    assert told == [["0", "2"], ["1"], ["3"], ["4"], ["5"]]
    lessons[2] = Lesson((), (Exercise("Look: <image>What?", "2"),))  # another start cannot share a row
    told = [[e.target for e in lesson.exercises] for lesson in packed_lessons(records[:3], lessons[:3])]
    assert told == [["0"], ["1"], ["2"]]
