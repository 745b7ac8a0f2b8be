"""How the decoder of `nano-real` copies a box that stands in the question, to the digit; begun after all else.

What it writes freely is near, but `[0.46, 0.38, 0.57, 0.46]` as an answer counts only if it is an option, and
embeddings of numbers that are smooth hardly tell 0.46 from 0.47. So the last leg starts with a second circuit, held as
the first (`start.py`). Of the residual stream it takes 24 more values:

    51..52  marks of text: opens a bracket; comes after one
    53..66  the value of a number, as waves, of which the shortest tell neighbours apart; written, they are its logit
    67..74  the number 2 tokens back, which is the one before in a box

In the second layer, a head writes what followed an earlier number like the one just written. In the fourth, one
attends to the first numbers of boxes where a box begins; which of them is to be learned.
"""

from __future__ import annotations

import torch
from nano_real.projector import CYCLES
from nano_real.questions import number_tokens
from nano_real.start import ASKED, POINTING, SHARPNESS, THIRD, Y, number_waves, silence, wave_places
from torch import Tensor, nn

from vitos.backbones.llava import Llava

OPENS, AFTER_OPEN = THIRD.stop, THIRD.stop + 1
FINE_CYCLES = (*CYCLES, 8.0, 16.0, 32.0)
FINE = slice(AFTER_OPEN + 1, AFTER_OPEN + 1 + 2 * len(FINE_CYCLES))
SECOND = slice(FINE.stop, FINE.stop + 2 * len(CYCLES))
TAKEN = slice(OPENS, SECOND.stop)
LOUDNESS = 0.5  # of a number's waves in its embedding
AGAIN, BEGIN = 2, 1  # heads of the second and the fourth layer
# Of values and of what is written of them; the later in the stream, the louder, to be heard in the logits.
COPIED = {AGAIN: 5.0, BEGIN: 12.0}


@torch.no_grad()
def hold_copying(backbone: Llava) -> None:
    """`copy_boxes` for the decoder of `nano-real`; visual tokens keep out of what it takes."""
    ids, model = backbone.tokenizer.get_vocab(), backbone.model.model
    numbers, opening = number_tokens(backbone.tokenizer), [ids[piece] for piece in ("[", "[[")]
    copy_boxes(model.language_model, backbone.model.lm_head.weight, numbers, opening)
    model.multi_modal_projector.linear_2.weight[TAKEN] = 0
    model.multi_modal_projector.linear_2.bias[TAKEN] = 0


@torch.no_grad()
def copy_boxes(language_model: nn.Module, embeddings: Tensor, number_ids: list[int], opening_ids: list[int]) -> None:
    """Write the circuit into a Llama that has the one of `look_at_places`, and again after each update.

    Args:
        embeddings: (V, hidden), tied.
        number_ids: tokens of 0.00 ... 1.00.
        opening_ids: tokens of brackets before a number.
    """
    embeddings[:, TAKEN] = 0
    embeddings[opening_ids, OPENS] = 1
    embeddings[number_ids, FINE] = LOUDNESS * number_waves(FINE_CYCLES, len(number_ids))
    first, second, third, fourth = language_model.layers
    for layer in (first, second, third):
        silence(layer, TAKEN)
    _mark_and_look_back(first.self_attn)
    _find_again(second.self_attn)
    _begin(fourth.self_attn)


def _mark_and_look_back(attention: nn.Module) -> None:
    """Head 0, which looks one token back, writes a mark, and head 1, which looks two back, the number there."""
    width, waves = attention.head_dim, torch.arange(2 * len(CYCLES))
    mark = len(waves) + 1  # of the values of both; `start.py` has those before
    attention.v_proj.weight[mark] = 0
    attention.v_proj.weight[mark, OPENS] = 0.15
    attention.v_proj.bias[mark] = 0
    attention.o_proj.weight[:, mark] = 0
    attention.o_proj.weight[AFTER_OPEN, mark] = 1
    attention.o_proj.weight[:, width + waves] = 0
    attention.o_proj.weight[SECOND.start + waves, width + waves] = 1


def _find_again(attention: nn.Module) -> None:
    """The head finds where the number just written stands before another number, and writes that one."""
    half, hidden = attention.head_dim // 2, attention.o_proj.weight.shape[0]
    keys, queries = (p.weight.view(-1, 2 * half, hidden) for p in (attention.k_proj, attention.q_proj))
    group = AGAIN // attention.num_key_value_groups
    queries[AGAIN] = 0
    attention.q_proj.bias.view(-1, 2 * half)[AGAIN] = 0
    for c in range(len(CYCLES)):
        pair = half - len(CYCLES) + c
        for wave, (row, asked) in enumerate(zip((pair, half + pair), wave_places(ASKED.start, Y)[c], strict=True)):
            keys[group, row] = 0
            keys[group, row, SECOND.start + 2 * c + wave] = SHARPNESS
            queries[AGAIN, row, asked] = SHARPNESS
    _write_number(attention, AGAIN)


def _begin(attention: nn.Module) -> None:
    """Where a bracket opens, the head attends to the first numbers of boxes and writes what it finds.

    Their waves are in the keys; what is looked for has to come into the queries.
    """
    half, hidden = attention.head_dim // 2, attention.o_proj.weight.shape[0]
    keys, queries = (p.weight.view(-1, 2 * half, hidden) for p in (attention.k_proj, attention.q_proj))
    group, slowest = BEGIN // attention.num_key_value_groups, half - 1
    for weight, index, mark in ((keys, group, AFTER_OPEN), (queries, BEGIN, OPENS)):
        weight[index, slowest] = 0
        weight[index, slowest, mark] = 2 * POINTING
    for c in range(len(CYCLES)):
        pair = slowest - len(CYCLES) + c
        for wave, row in enumerate((pair, half + pair)):
            keys[group, row] = 0
            keys[group, row, FINE.start + 2 * c + wave] = SHARPNESS
    _write_number(attention, BEGIN)


def _write_number(attention: nn.Module, head: int) -> None:
    """The head writes the waves of the number to which it attends."""
    width, waves = attention.head_dim, torch.arange(FINE.stop - FINE.start)
    values = width * (head // attention.num_key_value_groups) + waves
    attention.v_proj.weight[values] = 0
    attention.v_proj.weight[values, FINE.start + waves] = COPIED[head]
    attention.v_proj.bias[values] = 0
    attention.o_proj.weight[:, width * head + waves] = 0
    attention.o_proj.weight[FINE.start + waves, width * head + waves] = COPIED[head]
