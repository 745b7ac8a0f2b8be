"""The starting values of nano do what `build_nano` says of them."""

import torch
from scripts.nano_model import build_nano


def test_two_heads_of_the_first_layer_look_one_and_two_tokens_back():
    backbone = build_nano(seed=3)
    model = backbone.model.eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(100, 700, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(input_ids=ids, output_attentions=True).attentions[0].mean(0)  # (heads, query, key)
    share = [[head[5:].diagonal(5 - back).mean().item() for back in range(4)] for head in first]
    assert share[0][1] > 0.6
    assert share[1][2] > 0.6
    assert max(share[2] + share[3]) < 0.3


def test_neighbouring_numbers_start_alike():
    backbone = build_nano()
    table = backbone.model.get_input_embeddings().weight.detach()
    vocabulary = backbone.tokenizer.get_vocab()
    numbers = torch.nn.functional.normalize(table[[vocabulary[f"{i / 100:.2f}"] for i in range(101)]], dim=-1)
    alike = numbers @ numbers.T
    near, far = alike.diagonal(1), alike[:30, 60:]
    assert near.min() > 0.8
    assert far.abs().mean() < 0.3
