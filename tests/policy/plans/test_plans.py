"""Plans against what they promise, recomputed by hand; shared scans against scans of their own."""

import copy

import numpy as np
import pytest
import torch
from tests.backbones.families import FAMILIES, FAMILIES_BY_NAME
from tests.driven import told, up_to

from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.geometry import Rect, TokenGrid, out_of_crop
from vitos.core.prompt import pad_prompts
from vitos.core.registry import PLANS as REGISTRY
from vitos.core.sparsify import Fusion, cell_rectangles
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.policy.plans import Limits, get_plan
from vitos.policy.run import Piece
from vitos.policy.spec import HeadRule, VitosSpec
from vitos.policy.types import Finding, Query, Scan
from vitos.policy.vlm import SparseVLM

QUESTION = "What is shown?\nA. cyst\nB. mass"
PLANS = REGISTRY.names()


TEXT = "<think>x</think><evidence>[[0.25, 0.25, 0.63, 0.76]]</evidence><answer>A</answer>"
SMALL = "<evidence>[[0.5, 0.5, 0.7, 0.9]]</evidence>"


@pytest.fixture(scope="module")
def vlm():
    """The shape of nano, random, in float64, with a random evidence head behind its second layer."""
    backbone = copy.copy(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone())
    torch.manual_seed(0)
    backbone.evidence_head = EvidenceHead(backbone.model.config.get_text_config().hidden_size, 16)
    return SparseVLM(backbone, VitosSpec(evidence_head=HeadRule(after=2)))


def ask(vlm, image, plan, text=TEXT, tokens=6):
    """One question about an image; the localization says `text`."""
    return told(vlm, [vlm.encode(image, plan=plan)], [QUESTION], text, up_to(tokens), plan)[0]


@torch.no_grad()
def greedy(vlm, prompt, max_tokens=6):
    return vlm.engine.sample([prompt], Sampling(max_tokens), [[0]])[0][0].text


def test_every_plan_reports_time_tokens_and_what_it_kept(vlm, picture):
    image, findings = picture(128, 128), {}
    for plan in PLANS:
        findings[plan] = found = ask(vlm, image, plan)
        assert (found.plan, found.fallback, found.fallback_reason) == (plan, False, "")
        assert found.grid == TokenGrid.single(8, 8)
        assert set(found.tokens) <= set(found.seconds)
        assert found.tokens["reason_decode"] == len(found.reasoning.completion.token_ids)
    kept = findings["two_pass"].kept.mask.reshape(8, 8)
    assert kept.sum() == 20  # columns 2 to 5 of 8 touch 0.25..0.63, rows 2 to 6 touch 0.25..0.76
    assert kept[2:7, 2:6].all()
    for plan in ("gather", "coarse", "crop"):
        np.testing.assert_array_equal(findings[plan].kept.mask, kept.ravel())
    text = len(vlm.backbone.build_prompt(vlm.spec.reason_text("<image>" + QUESTION), vlm.encode(image).visuals)) - 64
    assert findings["glance"].kept.count == findings["one_pass"].kept.count == 16
    assert findings["glance"].tokens["early_prefill"] == findings["one_pass"].tokens["early_prefill"]
    assert findings["glance"].tokens["reason_prefill"] == text + 16
    assert findings["dense"].kept.all
    assert findings["dense"].localization is None
    assert findings["two_pass"].tokens["reason_prefill"] == text + 20
    assert findings["gather"].tokens["reason_prefill"] == findings["dense"].tokens["reason_prefill"] < text
    assert findings["coarse"].tokens["vision"] == 20
    assert vlm.encode(image, plan="coarse").visuals[0].grid == TokenGrid.single(4, 4)


@torch.no_grad()
def test_coarse_is_the_evidence_encoded_alone_at_its_place(vlm, picture):
    """By hand: the encoder on the patches of the cells, their embeddings at the dense positions, one full forward."""
    backbone, image = vlm.backbone, picture(128, 96)
    found = ask(vlm, image, "coarse")
    pixels = backbone.image_processor(images=[image], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 12, 16]]
    kept = found.kept.mask.reshape(6, 8)
    rows, cols = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
    assert kept.sum() == len(rows) * len(cols)
    chosen = [p for row in rows for col in cols for p in range((row * 8 + col) * 4, (row * 8 + col) * 4 + 4)]
    encoded = backbone.model.model.visual(
        pixels["pixel_values"][chosen].double(), torch.tensor([[1, 2 * len(rows), 2 * len(cols)]]), return_dict=True
    ).pooler_output
    (dense,) = backbone.encode([image])
    # Not what the whole image makes of these cells:
    assert (dense.embeddings[torch.from_numpy(found.kept.mask)] - encoded).abs().max() > 1e-3
    dense.embeddings[torch.from_numpy(found.kept.mask)] = encoded
    prompt = backbone.build_prompt(vlm.spec.reason_text("<image>" + QUESTION), [dense])
    prompt = prompt.sparse([torch.from_numpy(found.kept.mask)], Fusion("none"))
    ids = found.reasoning.completion.token_ids
    batch = pad_prompts([prompt], backbone.pad_token_id)
    after = prompt.next_position + torch.arange(len(ids))
    inputs = backbone.model_inputs(batch) | {
        "input_ids": torch.cat([batch.input_ids, ids[None]], 1),
        "attention_mask": None,
        "position_ids": torch.cat([batch.position_ids, after.expand(3, 1, -1)], 2),
    }
    logits = backbone.model(**inputs).logits[0, len(prompt) - 1 : -1]
    logits[:, list(backbone.banned_token_ids)] = float("-inf")
    assert logits.argmax(-1).tolist() == ids.tolist()
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(found.reasoning.completion.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "qwen2_5_vl, merge 3", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_layout_parts_and_reduced_images_of_a_family(name, picture):
    family = FAMILIES_BY_NAME[name]
    backbone = family.backbone()
    for size in family.sizes[:3]:
        image = picture(*size)
        (whole,) = backbone.encode([image])
        grid, resized = backbone.layout(image)
        assert (grid, resized) == (whole.grid, whole.resized)
        (view,) = grid.views
        small = backbone.encode_reduced(image)
        assert small.grid.num_tokens <= max(1, grid.num_tokens / 4)
        # All cells are the whole image, on every stream.
        everything = backbone.encode_cells(image, [(0, 0, view.rows, view.cols)])
        for got, expected in zip(everything, whole.tensors, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        # A part does not see the rest: of an image that was painted over elsewhere it is the same.
        if view.rows > 1 and not size[0] % 8 and not size[1] % 8:
            painted = image.copy()
            painted.paste((0, 0, 0), (0, image.height * (view.rows // 2 + 1) // view.rows, image.width, image.height))
            part = [(0, 0, view.rows // 2, view.cols)]
            for a, b in zip(backbone.encode_cells(image, part), backbone.encode_cells(painted, part), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@torch.no_grad()
def test_crop_is_a_dense_answer_about_the_cut_image(vlm, picture):
    image = picture(128, 128)
    found = ask(vlm, image, "crop")
    (cut,) = vlm.backbone.encode([image.crop((32, 32, 96, 112))])
    prompt = vlm.backbone.build_prompt(vlm.spec.reason_text("<image>" + QUESTION), [cut])
    assert found.reasoning.completion.text == greedy(vlm, prompt)
    assert found.tokens["vision"] == cut.grid.num_tokens


def test_without_evidence_every_plan_says_what_it_does_instead(vlm, picture):
    image = picture(128, 128)
    dense = ask(vlm, image, "dense")
    for plan in ("two_pass", "gather", "crop", "coarse"):
        found = ask(vlm, image, plan, "nothing")
        assert found.fallback
        assert "no box could be read" in found.fallback_reason
        assert found.kept.all
        assert found.reasoning.completion.text == dense.reasoning.completion.text
    assert "localized on again at full resolution; no box could be read; the whole image" in found.fallback_reason
    assert found.tokens["vision"] == 64


def test_a_box_smaller_than_a_reduced_cell_is_looked_for_again(vlm, picture):
    """Beside a question whose box is large enough, in one batch."""
    image = picture(128, 128)
    found, two_pass = ask(vlm, image, "coarse", SMALL), ask(vlm, image, "two_pass", SMALL)
    assert found.fallback_reason == (
        "a box is smaller than a cell of the reduced image; the image was localized on again at full resolution"
    )
    np.testing.assert_array_equal(found.kept.mask, two_pass.kept.mask)
    assert 0 < found.kept_ratio < 1
    assert found.reasoning.completion.text == two_pass.reasoning.completion.text


@pytest.mark.parametrize("plan", [*PLANS, "coarse, too small a box"])
def test_a_crop_of_a_file_is_answered_like_a_file_of_that_part(vlm, picture, tmp_path, plan):
    """And what is said of it is said of the stored image."""
    plan, _, small = plan.partition(", ")
    picture(256, 256).save(tmp_path / "whole.png")
    picture(256, 256).crop((128, 64, 256, 192)).save(tmp_path / "part.png")
    part, whole = (
        ask(vlm, tmp_path / name, plan, SMALL if small else TEXT)
        for name in ("part.png", "whole.png#crop=0.5,0.25,1,0.75")
    )
    assert whole.reasoning.completion.token_ids.tolist() == part.reasoning.completion.token_ids.tolist()
    assert whole.tokens == part.tokens
    np.testing.assert_array_equal(whole.kept.mask, part.kept.mask)
    assert whole.fallback == part.fallback == bool(small)
    crop = Rect(0.5, 0.25, 1.0, 0.75)
    assert whole.grid == part.grid.within(crop) == TokenGrid.single(8, 8).within(crop)
    assert [b.as_tuple() for b in whole.boxes] == [out_of_crop(b, crop).as_tuple() for b in part.boxes]


def test_plans_that_a_family_or_a_scan_cannot_follow_are_refused(vlm, picture):
    gemma = SparseVLM(next(f for f in FAMILIES if f.name.startswith("gemma3")).backbone())
    with pytest.raises(ValueError, match=r"Gemma3 has layers of sliding_attention.*use plan two_pass"):
        gemma.encode(picture(64, 64), plan="gather")
    with pytest.raises(ValueError, match="Gemma3 sees every image at one resolution, so plan coarse"):
        gemma.encode(picture(64, 64), plan="coarse")
    scan = vlm.encode(picture(64, 64))
    with pytest.raises(ValueError, match=r'another plan than coarse; use encode\(…, plan="coarse"\)'):
        vlm.ask(scan, QUESTION, plan="coarse")
    with pytest.raises(ValueError, match="plan crop encodes the image again"):
        vlm.ask(Scan(scan.visuals), QUESTION, plan="crop")
    with pytest.raises(ValueError, match="must begin alike up to"):
        vlm.with_spec(localize_prompt="Locate. {question}", plan="gather")
    with pytest.raises(ValueError, match="renumber has no effect"):
        SparseVLM(vlm.backbone, VitosSpec(positions="renumber", plan="gather"))
    with pytest.raises(
        ValueError, match="plan must be one of coarse, crop, dense, gather, glance, one_pass, two_pass"
    ):
        VitosSpec(plan="fast")


# --- many questions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "dense", "one_pass", "glance"])
def test_further_questions_pay_for_themselves_only(vlm, picture, plan, monkeypatch):
    """Outputs of ten questions about one scan are those of ten scans; tokens are counted where the model is called."""
    image, questions = picture(128, 128), [f"Is it number {k}?\nA. yes\nB. no" for k in range(10)]
    ran, call = [], vlm.backbone.model.forward
    monkeypatch.setattr(vlm.backbone.model, "forward", lambda **k: ran.append(k["input_ids"].numel()) or call(**k))

    def processed():
        count = sum(ran)
        ran.clear()
        return count

    scan = vlm.encode(image, plan=plan)
    prefix = processed()
    visual = 16 if plan in ("coarse", "glance") else 64
    assert prefix == len(scan.prefix) > visual
    shared, costs = [], []
    for question in questions:
        shared += told(vlm, [scan], [question], TEXT, up_to(6), plan)
        costs.append(processed())
        tokens = shared[-1].tokens
        # The last token of a completion is written, not run.
        branches = 1 if plan in ("dense", "one_pass", "glance") else 2
        assert costs[-1] == sum(n for stage, n in tokens.items() if stage != "vision") - branches
    kept = {"two_pass": 20, "coarse": 20, "one_pass": 16, "glance": 16}.get(plan, 0)
    assert max(costs) < 2 * (len(vlm.backbone.tokenizer(vlm.spec.localize_text(questions[0])).input_ids) + 30) + kept
    for question, found in zip(questions, shared, strict=True):
        unshared = Scan(scan.visuals, pictures=scan.pictures, reduced=scan.reduced)
        (alone,) = told(vlm, [unshared], [question], TEXT, up_to(6), plan)
        assert alone.reasoning.completion.token_ids.tolist() == found.reasoning.completion.token_ids.tolist()
        torch.testing.assert_close(
            alone.reasoning.completion.logprobs, found.reasoning.completion.logprobs, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_of_images_and_questions_is_each_alone(vlm, picture, plan):
    scans = [vlm.encode(picture(*size), plan=plan) for size in ((128, 128), (96, 160), (64, 64))]
    questions = [QUESTION, "What is this strange thing here?\nA. a\nB. b\nC. c", "Which?\nA. x\nB. y"]
    together = told(vlm, [*scans, scans[0]], [*questions, questions[1]], TEXT, up_to(6), plan)
    for found, scan, question in zip(together, [*scans, scans[0]], [*questions, questions[1]], strict=True):
        (alone,) = told(vlm, [scan], [question], TEXT, up_to(6), plan)
        assert found.reasoning.completion.token_ids.tolist() == alone.reasoning.completion.token_ids.tolist()
        np.testing.assert_array_equal(found.kept.mask, alone.kept.mask)


@pytest.mark.parametrize("plan", PLANS)
def test_a_stream_is_ask_piece_by_piece(vlm, picture, plan):
    scan = vlm.encode(picture(128, 128), plan=plan)
    expected, pieces = vlm.ask(scan, QUESTION, plan=plan, limits=up_to(8)), []
    steps = vlm.stream(scan, QUESTION, plan=plan, limits=up_to(8))
    while True:
        try:
            pieces.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(found, Finding)
    assert "".join(p.text for p in pieces if p.branch == "reason") == expected.reasoning.completion.text
    assert found.reasoning.completion.token_ids.tolist() == expected.reasoning.completion.token_ids.tolist()
    assert found.tokens == expected.tokens
    branches = [piece.branch for piece in pieces]
    assert branches == sorted(branches)  # localize, then reason


def test_limits(warm_policy, phantom_records):
    record = phantom_records[0]
    scan = warm_policy.encode(record.image_paths[0])
    whole = warm_policy.ask(scan, record.question, limits=up_to(40))
    assert whole.boxes
    assert whole.localization.completion.text.endswith("</answer>")
    short = warm_policy.ask(scan, record.question, limits=up_to(40, evidence_only=True))
    assert short.localization.completion.text.endswith("</evidence>")
    assert len(short.localization.completion.token_ids) < len(whole.localization.completion.token_ids)
    assert short.boxes == whole.boxes
    assert short.answer == whole.answer
    length = len(short.localization.completion.token_ids)
    cut = warm_policy.ask(scan, record.question, limits=Limits(max_tokens=40, max_evidence_tokens=length - 1))
    assert len(cut.localization.completion.token_ids) == length - 1
    assert cut.fallback
    stopped = warm_policy.ask(scan, record.question, limits=up_to(40, stop=("</think>",)))
    assert stopped.reasoning.completion.text.endswith("</think>")


def test_a_prefix_of_another_policy_is_not_used(warm_policy, clone_policy, phantom_records):
    record = phantom_records[0]
    other = clone_policy(warm_policy)
    with torch.no_grad():
        for parameter in other.backbone.model.model.language_model.parameters():
            parameter.mul_(0.9)
    scan = warm_policy.encode(record.image_paths[0])
    expected = other.ask(Scan(scan.visuals), record.question, limits=up_to(12))
    found = other.ask(scan, record.question, limits=up_to(12))
    assert found.tokens == expected.tokens
    assert found.reasoning.completion.text == expected.reasoning.completion.text


# --- rectangles -----------------------------------------------------------------------------------------------------


def test_cell_rectangles_hold_the_mask_and_touch_nowhere():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, cols = rng.integers(1, 9, 2)
        mask = rng.random(rows * cols) < rng.choice([0.05, 0.2, 0.5])
        found = cell_rectangles(TokenGrid.single(int(rows), int(cols)), mask)
        inner = np.zeros((rows, cols), dtype=int)
        for top, left, bottom, right in found:
            inner[top:bottom, left:right] += 1
            assert mask.reshape(rows, cols)[top:bottom, left:right].any()
        assert inner.max(initial=0) <= 1
        assert (inner.ravel() >= mask).all()
        for one in found:
            for other in found:
                gap = max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3])
                assert one is other or gap >= 1


def test_a_request_names_what_a_server_needs(vlm, picture):
    """Requests of two questions with unlike plans, completed in one batch by hand."""
    image = picture(128, 128)
    watch, waiting = Stopwatch(), []
    for plan in ("dense", "gather"):
        query = Query(vlm.encode(image), "<image>" + QUESTION)
        waiting.append((plan, get_plan(plan).steps(vlm.branches, [query], up_to(6), watch)))
    requests = [next(steps) for _, steps in waiting]
    assert [request.branch for request in requests] == ["reason", "localize"]
    prompts = [request.prompts[0] for request in requests]
    rows = vlm.engine.sample(prompts, Sampling(6), [[0]] * 2, prefixes=[r.prefixes[0] for r in requests])
    with pytest.raises(StopIteration) as end:
        waiting[0][1].send(rows[0])
    (outcome,) = end.value.value
    expected = vlm.ask(vlm.encode(image), QUESTION, plan="dense", limits=up_to(6))
    assert outcome.reasoning.completion.text == expected.reasoning.completion.text
