"""Rows that join and leave a running batch get the text that each of them gets alone."""

import pytest
import torch
from tests.backbones.families import FAMILIES

from vitos.engines.base import Sampling
from vitos.engines.continuous_batching import RunningBatch
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

TEXTS = ("Look: <image> Which kind is it?", "<image>", "A question that is a good deal longer. <image> Which one?")
LENGTHS = (9, 3, 6, 12)
STOP = ("</evidence>",)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def prompts_of(family, picture):
    backbone, sizes = family.backbone(), [*family.sizes, *family.sizes]
    with torch.no_grad():
        visuals = [backbone.encode([picture(*size)])[0] for size in sizes[: len(TEXTS)]]
    dense = [backbone.build_prompt(text, [visual]) for text, visual in zip(TEXTS, visuals, strict=True)]
    mask = torch.arange(len(dense[0].embeddings)) % 3 == 0
    return [*dense, dense[0].sparse([mask])]


def run(batch, arrivals):
    """Step until all rows have joined and ended; `arrivals` has the step at which each key joins."""
    waiting, text, done, step = dict(arrivals), {}, {}, 0
    while waiting or len(batch):
        for key, (when, prompt, sampling, prefix) in list(waiting.items()):
            if when <= step and batch.fits(prompt, sampling):
                batch.join(key, prompt, sampling, prefix)
                del waiting[key]
        for written in batch.step():
            text[written.key] = text.get(written.key, "") + written.text
            if written.completion is not None:
                done[written.key] = written.completion
        step += 1
    return text, done


@every_family
@torch.no_grad()
def test_rows_that_join_later_write_what_they_write_alone(family, picture):
    """Dense and sparse prompts of different length join after 0, 2, 4 and 6 tokens, when some have already ended."""
    engine, prompts = TorchEngine(family.backbone()), prompts_of(family, picture)
    alone = [engine.sample([p], Sampling(n), [[0]])[0][0] for p, n in zip(prompts, LENGTHS, strict=True)]
    batch = RunningBatch(engine)
    arrivals = {i: (2 * i, p, Sampling(n), None) for i, (p, n) in enumerate(zip(prompts, LENGTHS, strict=True))}
    text, done = run(batch, arrivals)
    assert len(batch) == 0
    for i, expected in enumerate(alone):
        assert done[i].token_ids.tolist() == expected.token_ids.tolist()
        torch.testing.assert_close(done[i].logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
        assert (done[i].text, done[i].finished) == (expected.text, expected.finished)
        assert text[i] == expected.text


@torch.no_grad()
def test_gathered_prompts_join_behind_their_prefix(nano, picture):
    engine = TorchEngine(nano)
    dense = nano.build_prompt(TEXTS[0], [nano.encode([picture(64, 48)])[0]])
    hidden = dense.gather([torch.arange(len(dense.embeddings)) % 2 == 0])
    prefix = engine.prefix(dense.head(dense.prefix_length))
    expected = engine.sample([dense, hidden], Sampling(8), [[0], [0]], prefixes=[prefix, prefix])
    _, done = run(RunningBatch(engine), {0: (0, dense, Sampling(8), prefix), 1: (3, hidden, Sampling(8), prefix)})
    for i in (0, 1):
        assert done[i].token_ids.tolist() == expected[i][0].token_ids.tolist()


@torch.no_grad()
def test_stop_strings_and_dropped_rows(picture):
    vlm = SparseVLM.from_pretrained("nano")
    scan = vlm.encode(picture(96, 96))
    prompt = vlm.branches.localize_prompt(Query(scan, "<image>What is shown?\nA. cyst\nB. nodule"))
    whole, cut = (vlm.engine.sample([prompt], s, [[0]])[0][0] for s in (Sampling(64), Sampling(64, stop=STOP)))
    assert "</evidence>" in whole.text[: -len("</evidence>")]
    batch = RunningBatch(vlm.engine)
    for key, sampling in enumerate((Sampling(64), Sampling(64, stop=STOP), Sampling(64))):
        batch.join(key, prompt, sampling)
    first = {written.key: written.text for written in batch.step()}
    batch.drop({2})
    text, done = run(batch, {})
    assert {key: c.text for key, c in done.items()} == {0: whole.text, 1: cut.text}
    assert {key: first[key] + rest for key, rest in text.items()} == {0: whole.text, 1: cut.text}
    assert done[1].finished


def test_room_is_bounded_and_sampling_is_greedy(nano, picture):
    with torch.no_grad():
        prompt = nano.build_prompt(TEXTS[0], [nano.encode([picture(64, 48)])[0]])
    batch = RunningBatch(TorchEngine(nano, max_batch_tokens=2 * (len(prompt) + 8)))
    for key in range(2):
        assert batch.fits(prompt, Sampling(8))
        batch.join(key, prompt, Sampling(8))
    assert not batch.fits(prompt, Sampling(8))
    with pytest.raises(ValueError, match="greedy"):
        batch.join(3, prompt, Sampling(8, temperature=1.0))
