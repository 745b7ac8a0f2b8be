"""The gate: in every case, vLLM has the torch engine's greedy tokens, and its log-probabilities within rounding."""

from types import SimpleNamespace

import pytest
import torch
from tests.engines.vllm.plugin import gate

TOLERANCE = 5e-5
"""float32, three layers, log-probabilities down to -20: rounding of another order of sums (measured: 2e-5)."""


@pytest.fixture(scope="module", params=list(gate.MODELS))
def model(request, vllm, tmp_path_factory):
    """A model on disk, and the torch engine's results for all cases."""
    folder = tmp_path_factory.mktemp("model")
    backbone = gate.write_model(request.param, folder)
    said = [gate.torch_says(backbone, case) for case in gate.CASES]
    return SimpleNamespace(name=request.param, folder=folder, backbone=backbone, said=said)


@pytest.fixture(scope="module")
def llm(model, started):
    with started(model.folder, model.backbone, limit_mm_per_prompt={"image": 2, "video": 0}) as engine:
        yield engine


def sampling(backbone, **more):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=gate.TOKENS, logprobs=0, stop_token_ids=list(backbone.stop_token_ids), **more
    )


def pixel_requests(model):
    """Requests as a user sends them: text, pictures and the option."""
    out = []
    for case, said in zip(gate.CASES, model.said, strict=True):
        request = {"prompt": gate.chat_text(model.backbone, case), "multi_modal_data": {"image": case.images}}
        if any(keep is not None for keep in said.keep):
            option = {"keep": said.keep, "fusion": case.fusion.mode, "beta": case.fusion.beta}
            request["mm_processor_kwargs"] = {"vitos": option}
        out.append(request)
    return out


def run_prompts(llm, prompts, parameters):
    """Our prompts, without any processor of vLLM."""
    from vitos.engines.vllm.plugin.prompts import engine_input

    engine = llm.llm_engine
    order = {f"case-{i}": i for i in range(len(prompts))}
    for name, prompt in zip(order, prompts, strict=True):
        engine.add_request(name, engine_input(prompt), parameters)
    done = {}
    while engine.has_unfinished_requests():
        done |= {order[o.request_id]: o for o in engine.step() if o.finished}
    return [done[i] for i in range(len(prompts))]


def logprobs(rows, ids):
    return torch.tensor([row[token].logprob for row, token in zip(rows, ids, strict=True)])


def compare(model, outputs, way, note):
    for case, said, output in zip(gate.CASES, model.said, outputs, strict=True):
        ids, completion = list(output.prompt_token_ids), output.outputs[0]
        assert ids == said.prompt.input_ids.tolist(), case.name
        prompt = (logprobs(output.prompt_logprobs[1:], ids[1:]) - said.prompt_logprobs).abs().max()
        assert list(completion.token_ids) == said.token_ids, case.name
        generated = (logprobs(completion.logprobs, said.token_ids) - said.logprobs).abs().max()
        kept = int(said.prompt.is_visual.sum())
        note(f"{model.name}; {way}; {case.name}", kept, len(said.token_ids), float(prompt), float(generated))
        assert prompt < TOLERANCE, case.name
        assert generated < TOLERANCE, case.name


def test_the_cases_can_tell_right_from_wrong(model):
    """Completions are long and all different, and text-like positions give the same tokens other probabilities."""
    assert len({tuple(said.token_ids) for said in model.said}) >= len(gate.CASES) - 1  # "whole" is "all in a list"
    assert all(len(set(said.token_ids)) > 7 for said in model.said)
    for case, said in zip(gate.CASES, model.said, strict=True):
        if case.name == "portrait, random":
            moved = torch.arange(len(said.prompt)).expand(len(said.prompt.position_ids), -1)
            from dataclasses import replace

            other = gate.prompt_logprobs(model.backbone, replace(said.prompt, position_ids=moved))
            assert (other - said.prompt_logprobs).abs().max() > 0.1


def test_pixels_with_our_option(model, llm, note):
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    outputs = llm.generate(pixel_requests(model), sampling(model.backbone, prompt_logprobs=0), use_tqdm=False)
    compare(model, outputs, "pixels", note)
    images = runner.model.encoded_images
    assert images.encoded == 3  # the three different pictures of all cases, each once
    assert images.reused >= len(gate.CASES) - 3
    warm = llm.generate(pixel_requests(model), sampling(model.backbone), use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in warm] == [said.token_ids for said in model.said]
    assert any(o.num_cached_tokens for o in warm)
    assert images.encoded == 3


def test_visual_tokens_and_positions(model, llm, note):
    prompts = [said.prompt for said in model.said]
    outputs = run_prompts(llm, prompts, sampling(model.backbone, prompt_logprobs=0))
    compare(model, outputs, "visual tokens", note)
    warm = run_prompts(llm, prompts, sampling(model.backbone))
    assert [list(o.outputs[0].token_ids) for o in warm] == [said.token_ids for said in model.said]
    assert any(o.num_cached_tokens for o in warm)


def test_text_only(model, llm):
    prompt = model.backbone.build_prompt("What is a cyst?", [])
    (output,) = run_prompts(llm, [prompt], sampling(model.backbone, prompt_logprobs=0))
    ids = prompt.input_ids.tolist()
    gap = logprobs(output.prompt_logprobs[1:], ids[1:]) - gate.prompt_logprobs(model.backbone, prompt)
    assert gap.abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"keep": [[0, 100_000]]}, "token 100000 of an image"),
        ({"keep": [[0], [0]]}, "for each of 1 images"),
        ({"keep": [[]]}, "at least one"),
    ],
)
def test_a_wrong_option_is_refused_and_the_engine_goes_on(model, llm, option, message):
    request = pixel_requests(model)[0] | {"mm_processor_kwargs": {"vitos": option}}
    with pytest.raises(ValueError, match=message):
        llm.generate([request], sampling(model.backbone), use_tqdm=False)
    (output,) = llm.generate(pixel_requests(model)[:1], sampling(model.backbone), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == model.said[0].token_ids


@pytest.mark.parametrize("model", ["qwen2_5_vl, untied"], indirect=True)
def test_images_cut_by_chunked_prefill(model, started, note):
    """Steps of 24 tokens cut most images in two; no encoded images are kept."""
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    with started(model.folder, model.backbone, **options) as llm:
        outputs = llm.generate(pixel_requests(model), sampling(model.backbone, prompt_logprobs=0), use_tqdm=False)
        compare(model, outputs, "pixels, 24 tokens a step", note)
        outputs = run_prompts(llm, [s.prompt for s in model.said], sampling(model.backbone, prompt_logprobs=0))
        compare(model, outputs, "visual tokens, 24 a step", note)
