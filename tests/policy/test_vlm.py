"""`SparseVLM` against its own parts put together by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.driven import up_to

from vitos.core.geometry import Box
from vitos.core.response import parse_localization, parse_reasoning
from vitos.core.sparsify import Fusion, Kept, fuse, select
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.policy.locate import resolve_model_path
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM


@pytest.fixture(scope="module")
def scans(warm_policy, phantom_records):
    return [warm_policy.encode(record.image_paths[0]) for record in phantom_records]


def sparse_prompt(policy, query, mask):
    return policy.plan.prompt(policy.branches, query, Kept(query.grid, mask))


def test_ask_is_localize_select_reason(warm_policy, phantom_records, scans):
    sparse = 0
    for record, scan in zip(phantom_records, scans, strict=True):
        found = warm_policy.ask(scan, record.question, limits=up_to(30))
        engine, backbone, spec = warm_policy.engine, warm_policy.backbone, warm_policy.spec
        (visual,) = scan.visuals
        dense = backbone.build_prompt(spec.localize_text(record.question), [visual])
        text = engine.sample([dense], Sampling(30), [[0]])[0][0].text
        located = parse_localization(text, record.options)
        assert found.localization.completion.text == text
        assert found.boxes == located.boxes
        selection = select(visual.grid, located.boxes, spec.keep)
        np.testing.assert_array_equal(found.kept.mask, selection.mask)
        assert found.fallback == (not located.boxes)
        assert found.kept_ratio == selection.mask.sum() / 64
        prompt = backbone.build_prompt(spec.reason_text(record.question), [visual])
        if not found.fallback:
            prompt = prompt.sparse([torch.from_numpy(selection.mask)], spec.fusion)
            sparse += 1
        text = engine.sample([prompt], Sampling(30), [[0]])[0][0].text
        answered = parse_reasoning(text, record.options)
        assert (found.answer, found.thought) == (answered.answer, answered.thought)
        assert found.reasoning.completion.text == text
        assert set(found.seconds) == {
            "localize_prefill",
            "localize_decode",
            "sparsify",
            "reason_prefill",
            "reason_decode",
        }
    assert sparse > 0


def test_evidence_that_cannot_be_read_is_a_fallback_to_all_tokens(warm_policy, phantom_records, scans):
    found = warm_policy.ask(scans[0], phantom_records[0].question, limits=up_to(2))
    assert (found.boxes, found.fallback, found.kept_ratio, found.answer) == ((), True, 1.0, None)


def test_a_question_without_placeholder_gets_one_for_each_image(warm_policy, phantom_records, scans):
    record = phantom_records[1]
    bare = record.question.replace("<image>", "")
    a, b = (warm_policy.ask(scans[1], text, limits=up_to(24)) for text in (record.question, bare))
    assert a.localization.completion.text == b.localization.completion.text


def test_of_several_images_each_keeps_its_own_tokens(warm_policy, phantom_records):
    scan = warm_policy.encode(*(record.image_paths[0] for record in phantom_records[:2]))
    text = "What differs?\nA. nothing\nB. all"
    found = warm_policy.ask(scan, text, boxes=[Box(0, 0, 0.5, 0.5, 2)], limits=up_to(3))
    none, quarter = found.kept.images
    assert (none.count, quarter.count, found.kept_ratio) == (0, 16, 0.125)
    query = Query(scan, f"<image><image>{text}")
    assert query.options == {"A": "nothing", "B": "all"}
    mask = np.arange(128) % 64 < 10
    first, second = (visual.embeddings for visual in scan.visuals)
    plain, mean = (warm_policy.with_spec(fusion=Fusion(mode)) for mode in ("none", "mean"))
    assert torch.equal(sparse_prompt(plain, query, mask).embeddings, torch.cat([first[:10], second[:10]]))
    # Fused within an image: the same as each image alone.
    alone = [fuse([tokens], torch.arange(64) < 10, Fusion("mean"))[0] for tokens in (first, second)]
    assert torch.equal(sparse_prompt(mean, query, mask).embeddings, torch.cat(alone))
    whole = warm_policy.branches.reason_prompt(query)
    assert torch.equal(whole.embeddings, torch.cat([first, second]))
    # An image without tokens leaves its number, and the text keeps its places.
    one = sparse_prompt(plain, query, np.arange(128) < 10)
    words = warm_policy.backbone.tokenizer.decode(one.input_ids)
    assert "Image 1:" in words
    assert "Image 2:" in words
    assert one.next_position == whole.next_position
    assert len(one) == len(whole) - 118


def test_boxes_in_an_image_that_is_not_there_are_refused(warm_policy, phantom_records):
    scan = warm_policy.encode(phantom_records[0].image_paths[0])
    with pytest.raises(ValueError, match="a box lies in image 2, but the question has 1"):
        warm_policy.ask(scan, "What is it?", boxes=[Box(0, 0, 1, 1, 2)])


def test_outside_tokens_are_fused_and_positions_follow_the_spec(warm_policy, phantom_records, scans):
    query, mask = Query(scans[0], phantom_records[0].question), np.arange(64) % 3 == 0
    sparse = {
        name: sparse_prompt(policy, query, mask)
        for name, policy in {
            "fused": warm_policy,
            "plain": warm_policy.with_spec(fusion=Fusion("none")),
            "renumbered": warm_policy.with_spec(positions="renumber"),
        }.items()
    }
    (visual,) = scans[0].visuals
    assert torch.equal(sparse["plain"].embeddings, visual.embeddings[torch.from_numpy(mask)])
    assert not torch.equal(sparse["fused"].embeddings, sparse["plain"].embeddings)
    assert sparse["renumbered"].position_ids[0].tolist() == list(range(len(sparse["renumbered"])))
    assert sparse["renumbered"].next_position == len(sparse["renumbered"])
    assert sparse["fused"].next_position == warm_policy.branches.reason_prompt(query).next_position
    assert warm_policy.spec.fusion == Fusion()  # `with_spec` leaves the policy as it was


def test_seeds_give_that_many_rollouts_and_only_listed_letters(warm_policy, phantom_records, scans):
    record = phantom_records[0]
    query = Query(scans[0], record.question)
    ((*rollouts,),) = warm_policy.localize([query], Sampling(24, 1.0), [[1, 2, 1]])
    assert len(rollouts) == 3
    assert torch.equal(rollouts[0].completion.token_ids, rollouts[2].completion.token_ids)
    assert all(r.response.answer in (*query.options, None) for r in rollouts)


def test_images_and_paths_are_encoded_alike_one_by_one_or_together(warm_policy, phantom_records, scans):
    images = [Image.open(record.image_paths[0]).convert("L") for record in phantom_records[:3]]
    together = warm_policy.branches.encode_many([[image.convert("RGB")] for image in images])
    for scan, image, other in zip(scans, images, together, strict=False):
        torch.testing.assert_close(scan.visuals[0].embeddings, other.visuals[0].embeddings, atol=1e-4, rtol=1e-4)
        assert torch.equal(scan.visuals[0].embeddings, warm_policy.encode(image).visuals[0].embeddings)
        assert not other.visuals[0].embeddings.requires_grad


def test_saved_policy_loads_with_its_spec_and_refuses_another_geometry(warm_policy, phantom_records, scans, tmp_path):
    policy = warm_policy.with_spec(fusion=Fusion("mean"), positions="renumber")
    policy.save_pretrained(tmp_path)
    loaded = SparseVLM.from_pretrained(tmp_path, device="cpu")
    assert loaded.spec == replace(policy.spec, geometry=policy.backbone.geometry)
    question = phantom_records[0].question
    assert loaded.ask(
        loaded.encode(phantom_records[0].image_paths[0]), question, limits=up_to(24)
    ).localization.completion.text == (policy.ask(scans[0], question, limits=up_to(24)).localization.completion.text)
    with pytest.raises(ValueError, match="boxes would shift"):
        SparseVLM.from_pretrained(tmp_path, device="cpu", max_pixels=64 * 64)
    (tmp_path / "vitos.json").unlink()
    assert SparseVLM.from_pretrained(tmp_path, device="cpu").spec == VitosSpec()
    own = VitosSpec(reason_prompt="{question} Go.")
    assert SparseVLM.from_pretrained(tmp_path, device="cpu", spec=own).spec == own


@pytest.mark.parametrize(("key", "value"), [("patch_size", 16), ("merge_size", 1)])
def test_an_image_processor_of_other_patches_is_refused_by_name(tmp_path, key, value):
    shutil.copytree(resolve_model_path("nano"), tmp_path / "edited")
    file = tmp_path / "edited/preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"edited: trained with .*{key}.*boxes would shift"):
        SparseVLM.from_pretrained(tmp_path / "edited")


def test_stopwatch_adds_up_and_counts_failed_stages(monkeypatch):
    ticks = iter([0.0, 1.0, 5.0, 7.5, 8.0, 8.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    for name in ("a", "a"):
        with watch.span(name):
            pass
    with pytest.raises(KeyError), watch.span("b"):
        raise KeyError
    assert watch.seconds == {"a": 3.5, "b": 0.25}
