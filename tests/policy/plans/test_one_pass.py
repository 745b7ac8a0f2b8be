"""Plan one_pass: its choice against the library's hidden states, and what it says of it."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.backbones.families import FAMILIES, FAMILIES_BY_NAME
from tests.backbones.family import library_inputs
from tests.driven import up_to

from vitos.backbones.evidence_head import FILE_NAME, HEADS, EvidenceHead
from vitos.core.geometry import Box, TokenGrid
from vitos.core.sparsify import Fusion, cell_rectangles, select
from vitos.engines.base import Sampling
from vitos.policy.spec import HeadRule, VitosSpec
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

QUESTION = "What is shown?\nA. cyst\nB. mass"
AFTER = 1


def with_head(backbone, **rule):
    backbone = copy.copy(backbone)
    torch.manual_seed(3)
    backbone.evidence_head = HEADS[rule.get("kind", "pointer")](
        backbone.model.config.get_text_config().hidden_size, 16
    )
    return SparseVLM(backbone, VitosSpec(evidence_head=HeadRule(after=AFTER, **rule), plan="one_pass"))


@pytest.fixture(scope="module")
def vlm():
    return with_head(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone())


@torch.no_grad()
def by_hand(family, head, text, image):
    """Scores of the visual tokens from the hidden states that enter the next layer of the library's model."""
    backbone = family.backbone()
    inputs = library_inputs(family.processor(), text, [image])
    seen = []
    layer = backbone.model.model.language_model.layers[AFTER]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    backbone.model(**inputs)
    hook.remove()
    (states,) = seen
    visual = inputs["input_ids"][0] == backbone.model.config.image_token_id
    layer_norm, weights = torch.nn.functional.layer_norm, head.state_dict()

    def normed(x, name):
        return layer_norm(x.float(), x.shape[-1:], weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())

    asked = (
        normed(states[-1], "norm_question") @ weights["question.weight"].float().T + weights["question.bias"].float()
    )
    tokens = normed(states[visual], "norm_token")
    keys = tokens @ weights["token.weight"].float().T + weights["token.bias"].float()
    place = tokens @ weights["place.weight"].float().T + weights["place.bias"].float()
    return (keys @ asked / 4 + place[:, 0]).numpy()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_best_cells_by_the_hidden_states_of_the_library_are_kept(family, picture):
    vlm = with_head(family.backbone())
    image = picture(*family.sizes[0])
    scores = by_hand(family, vlm.backbone.evidence_head, vlm.spec.reason_text("<image>" + QUESTION), image)
    scan = vlm.encode(image)
    finding = vlm.ask(scan, QUESTION, limits=up_to(4))
    np.testing.assert_allclose(finding.kept.scores, scores, rtol=0, atol=1e-4)
    count = round(0.25 * len(scores))
    assert finding.kept.count == count
    assert scores[finding.kept.mask].min() >= scores[~finding.kept.mask].max() - 1e-4
    assert (finding.plan, finding.localization, finding.fallback) == ("one_pass", None, False)
    # The answer is that of the prompt which loses the other tokens; each kept cell lies in a box, no box is empty.
    prompt = vlm.branches.reason_prompt(Query.about(scan, QUESTION))
    prompt = prompt.prune([torch.from_numpy(finding.kept.mask)], AFTER)
    (expected,) = vlm.engine.sample([prompt], Sampling(4), [[0]])[0]
    assert finding.reasoning.completion.token_ids.tolist() == expected.token_ids.tolist()
    inside = select(finding.grid, finding.boxes).mask
    shown = finding.grid.overlapping([Box(*finding.grid.shown.as_tuple())])
    assert (inside | ~finding.kept.mask | ~shown).all()


def test_budget_threshold_and_smallest_number(vlm, picture):
    scan = vlm.encode(picture(128, 128))
    scores = vlm.ask(scan, QUESTION, limits=up_to(2)).kept.scores
    for budget, count in ((0.1, 6), (0.5, 32), (1.0, 64)):
        kept = vlm.ask(scan, QUESTION, budget=budget, limits=up_to(2)).kept
        assert kept.count == count
        assert set(np.argsort(-scores, kind="stable")[:count]) == set(np.flatnonzero(kept.mask))
    middle = float(np.sort(scores)[-10])
    limit = float(torch.tensor(middle).sigmoid()) - 1e-7
    rule = HeadRule(after=AFTER, threshold=limit)
    assert vlm.with_spec(evidence_head=rule).ask(scan, QUESTION, limits=up_to(2)).kept.count == 10
    rule = HeadRule(after=AFTER, threshold=1 - 1e-9)  # nothing is above it: the smallest number is kept
    assert vlm.with_spec(evidence_head=rule).ask(scan, QUESTION, limits=up_to(2)).kept.count == 1


def test_what_a_person_says_to_keep_is_kept(vlm, picture):
    scan, boxes = vlm.encode(picture(128, 128)), [Box(0, 0, 0.5, 0.25)]
    finding = vlm.ask(scan, QUESTION, boxes=boxes, limits=up_to(2))
    assert finding.boxes == tuple(boxes)
    np.testing.assert_array_equal(finding.kept.mask, select(scan.visuals[0].grid, boxes).mask)
    assert finding.kept.scores is None
    tokens = np.arange(64) % 7 == 0
    (found,) = vlm.answer([Query.about(scan, QUESTION, tokens=tokens)], limits=up_to(2))
    np.testing.assert_array_equal(found.kept.mask, tokens)


def test_a_checkpoint_holds_the_head_and_remains_an_ordinary_one(vlm, picture, tmp_path):
    from transformers import AutoModelForImageTextToText

    vlm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vitos.json").read_text())["evidence_head"]["file"] == FILE_NAME
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    del plain
    again, image = SparseVLM.from_pretrained(tmp_path, device="cpu"), picture(128, 128)
    assert again.spec.plan == "one_pass"
    found, expected = (one.ask(one.encode(image), QUESTION, limits=up_to(2)) for one in (again, vlm))
    np.testing.assert_allclose(found.kept.scores, expected.kept.scores, rtol=0, atol=1e-4)
    other = SparseVLM.from_pretrained(tmp_path, device="cpu", spec=VitosSpec())
    assert other.spec.evidence_head == vlm.spec.evidence_head
    (tmp_path / FILE_NAME).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"evidence_head\.safetensors is missing"):
        SparseVLM.from_pretrained(tmp_path, device="cpu")
    EvidenceHead(24, 8).save(tmp_path)
    with pytest.raises(ValueError, match="hidden states of 24 numbers, but the model's have 128"):
        SparseVLM.from_pretrained(tmp_path, device="cpu")


def test_a_checkpoint_without_a_head_is_refused(picture):
    plain = SparseVLM(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone())
    with pytest.raises(ValueError, match=r"no evidence head.*vitos distill"):
        plain.encode(picture(64, 64), plan="one_pass")
    with pytest.raises(ValueError, match=r"no evidence head.*vitos distill"):
        plain.ask(plain.encode(picture(64, 64)), QUESTION, plan="one_pass")
    deep = with_head(plain.backbone).with_spec(evidence_head=HeadRule(after=9))
    with pytest.raises(ValueError, match="after 9 layers, but Qwen25VL has 4"):
        deep.encode(picture(64, 64))
    with pytest.raises(ValueError, match="renumber has no effect"):
        VitosSpec(plan="one_pass", positions="renumber", evidence_head=HeadRule(after=1)) and SparseVLM(
            plain.backbone, VitosSpec(plan="one_pass", positions="renumber")
        )


def test_a_rival_head_is_saved_and_read_as_what_it_is(picture, tmp_path):
    vlm, image = with_head(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone(), kind="glimpse"), picture(128, 128)
    vlm.save_pretrained(tmp_path)
    again = SparseVLM.from_pretrained(tmp_path, device="cpu")
    found, expected = (one.ask(one.encode(image), QUESTION, limits=up_to(2)) for one in (again, vlm))
    np.testing.assert_allclose(found.kept.scores, expected.kept.scores, rtol=0, atol=1e-4)
    other = vlm.ask(vlm.encode(image), "Which?\nA. x\nB. y", limits=up_to(2))
    assert np.abs(other.kept.scores - expected.kept.scores).max() > 1e-4  # its token has read the question
    spec = json.loads((tmp_path / "vitos.json").read_text())
    spec["evidence_head"]["kind"] = "pointer"
    (tmp_path / "vitos.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="no evidence head of kind pointer"):
        SparseVLM.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("name", "value"), [("kind", "x"), ("after", -1), ("keep", 0.0), ("threshold", 1.0), ("file", "../x")]
)
def test_a_rule_refuses_what_it_cannot_mean(name, value):
    with pytest.raises(ValueError, match="must be"):
        HeadRule(**{"after": 1, name: value})


# --- glance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "qwen3_vl"])
@torch.no_grad()
def test_a_glance_keeps_the_best_cells_of_the_reduced_image_and_encodes_them_alone(name, picture):
    """By hand: the library's hidden states on the image that Pillow halved, and Pillow's bilinear enlargement."""
    family = FAMILIES_BY_NAME[name]
    vlm = with_head(family.backbone()).with_spec(plan="glance")
    backbone, text = vlm.backbone, vlm.spec.reason_text("<image>" + QUESTION)
    side = backbone.geometry.patch_size * backbone.geometry.merge_size
    (view,) = backbone.layout(picture(600, 900))[0].views
    rows, cols = view.rows - view.rows % 2, view.cols - view.cols % 2
    image = picture(cols * side, rows * side)
    small = image.resize((cols * side // 2, rows * side // 2), Image.Resampling.BICUBIC)
    scores = by_hand(family, backbone.evidence_head, text, small).reshape(rows // 2, cols // 2)
    large = np.asarray(Image.fromarray(scores.astype(np.float32)).resize((cols, rows), Image.Resampling.BILINEAR))
    finding = vlm.ask(vlm.encode(image), QUESTION, limits=up_to(4))
    np.testing.assert_allclose(finding.kept.scores, large.ravel(), rtol=0, atol=2e-4)
    assert finding.kept.count == round(0.25 * rows * cols)
    assert large.ravel()[finding.kept.mask].min() >= large.ravel()[~finding.kept.mask].max() - 2e-4
    mask = torch.from_numpy(finding.kept.mask)
    (whole,) = backbone.encode([image])
    parts = cell_rectangles(finding.grid, finding.kept.mask)
    place = np.concatenate([np.arange(rows * cols).reshape(rows, cols)[a:c, b:d].ravel() for a, b, c, d in parts])
    tensors = [t.clone() for t in whole.tensors]
    for own, cells in zip(tensors, backbone.encode_cells(image, parts), strict=True):
        own[torch.from_numpy(place)] = cells
    seen = replace(whole, embeddings=tensors[0], streams=tuple(tensors[1:]))
    prompt = backbone.build_prompt(text, [seen]).sparse([mask], Fusion("none"))
    (expected,) = vlm.engine.sample([prompt], Sampling(4), [[0]])[0]
    assert finding.reasoning.completion.token_ids.tolist() == expected.token_ids.tolist()
    torch.testing.assert_close(finding.reasoning.completion.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert finding.localization is None


def test_a_glance_follows_boxes_and_budgets_in_cells_of_the_whole_image(picture):
    vlm = with_head(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()).with_spec(plan="glance")
    scan, boxes = vlm.encode(picture(128, 128)), [Box(0, 0, 0.5, 0.25)]
    for budget, count in ((0.05, 3), (0.5, 32), (1.0, 64)):
        assert vlm.ask(scan, QUESTION, budget=budget, limits=up_to(2)).kept.count == count
        given = vlm.ask(scan, QUESTION, boxes=boxes, budget=budget, limits=up_to(2))
        assert (given.kept.count, given.boxes) == (count, tuple(boxes))
    kept = vlm.ask(scan, QUESTION, boxes=boxes, limits=up_to(2)).kept
    np.testing.assert_array_equal(kept.mask, select(TokenGrid.single(8, 8), boxes).mask)
    with pytest.raises(ValueError, match="encodes the image twice"):
        vlm.answer([Query.about(scan, QUESTION, tokens=np.ones(16, bool))])
    with pytest.raises(ValueError, match=r'made for another plan than glance; use encode\(…, plan="glance"\)'):
        vlm.ask(vlm.encode(picture(64, 64), plan="one_pass"), QUESTION)


def test_a_glance_at_two_images_keeps_cells_where_the_scores_are(picture):
    vlm = with_head(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()).with_spec(plan="glance")
    images = picture(128, 128), picture(96, 64, 1)
    finding = vlm.ask(vlm.encode(*images), "<image><image>" + QUESTION, budget=0.1, limits=up_to(2))
    assert finding.grid == TokenGrid.joined([TokenGrid.single(8, 8), TokenGrid.single(4, 6)])
    assert finding.kept.count == round(0.1 * 88)
    assert finding.kept.scores[finding.kept.mask].min() >= finding.kept.scores[~finding.kept.mask].max()
