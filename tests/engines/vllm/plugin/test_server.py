"""The gate through vLLM's OpenAI server, in a separate process, with the official client."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from tests.engines.vllm.plugin import gate
from tests.engines.vllm.plugin.test_gate import TOLERANCE

PATIENCE = 900  # seconds, on a busy machine


@pytest.fixture(scope="module", params=["qwen2_5_vl, untied", "llava, qwen2, padded"])
def server(request, vllm, tmp_path_factory):
    openai = pytest.importorskip("openai", reason="comes with vLLM")
    from vitos.engines.vllm.sampler import vllm_options

    folder = tmp_path_factory.mktemp("model")
    backbone = gate.write_model(request.param, folder)
    options = vllm_options(folder, backbone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "m"]
    command += ["--model", options["model"], "--hf-overrides", json.dumps(options["hf_overrides"])]
    command += ["--logits-processors", *options["logits_processors"], "--logprobs-mode", options["logprobs_mode"]]
    command += ["--additional-config", json.dumps(options["additional_config"]), "--trust-request-mm-kwargs"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"]
    command += ["--block-size", "32", "--limit-mm-per-prompt", json.dumps({"image": 2}), "--port", str(port)]
    log = folder / "server.log"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
        yield SimpleNamespace(client=client, backbone=backbone, name=request.param, openai=openai)
    finally:
        process.terminate()
        process.wait(timeout=120)


def _wait(process, url, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no server after {PATIENCE} s:\n{log.read_text()[-3000:]}")


def ask(server, case, option, **more):
    parts = []
    for image in case.images:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": case.text.replace("<image>", "")})
    extra = {"return_token_ids": True, "stop_token_ids": list(server.backbone.stop_token_ids)}
    if option is not None:
        extra["mm_processor_kwargs"] = {"vitos": option}
    return server.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=gate.TOKENS,
        extra_body=extra | more,
    )


def option_of(case, said):
    if all(keep is None for keep in said.keep):
        return None
    return {"keep": said.keep, "fusion": case.fusion.mode, "beta": case.fusion.beta}


def test_every_case_over_http(server, note):
    for case in gate.CASES:
        said = gate.torch_says(server.backbone, case)
        answer = ask(server, case, option_of(case, said), prompt_logprobs=0)
        ids = answer.prompt_token_ids
        assert ids == said.prompt.input_ids.tolist(), case.name
        rows = answer.prompt_logprobs[1:]
        got = torch.tensor([row[str(token)]["logprob"] for row, token in zip(rows, ids[1:], strict=True)])
        gap = float((got - said.prompt_logprobs).abs().max())
        assert answer.choices[0].token_ids == said.token_ids, case.name
        kept = int(said.prompt.is_visual.sum())
        note(f"{server.name}; HTTP; {case.name}", kept, len(said.token_ids), gap, 0.0)
        assert gap < TOLERANCE, case.name


def test_a_wrong_option_is_the_clients_error(server):
    case = gate.CASES[0]
    for option in ({"keep": [[100_000]]}, {"keep": []}, {"keep": [[0]], "fusion": "max"}, ["keep"]):
        with pytest.raises(server.openai.BadRequestError):
            ask(server, case, option)
    said = gate.torch_says(server.backbone, case)
    assert ask(server, case, option_of(case, said)).choices[0].token_ids == said.token_ids
