"""How the decoder of `nano-real` starts: able to look at a place that a question names.

Trained from random weights it stays at chance on such questions for thousands of updates: numbers have to be gathered
from several tokens, compared with where each visual token is, and nothing is gained before all of that works. So the
first three layers start with that circuit, and training goes on from there. Of the residual stream it takes 51 values:

    0..15   where a visual token is (`PlacePath` writes it; text starts with 0)
    16..18  1 where a bracket closes; 1 for a number; 1 where the token before is a number (visual tokens have 0 here)
    19..26  the value of a number, as waves
    27..42  the place (x, y) just read: the number 5 tokens back is x, the one before is y, as in "(x=0.52, y=0.34)"
    43..50  the number 3 tokens back, which is x2 at the end of "[x1, y1, x2, y2]"

In the first layer four heads look back; in the second, one head attends to visual tokens where (x, y) is, and one to
those around the middle of a window whose lower right corner is (x2, y2); in the third, two heads attend to where a
bracket closes behind a number, so that what was seen there is known where the answer begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from nano_real.projector import CYCLES, HELD, PLACE
from nano_real.questions import WINDOW, number_tokens
from torch import Tensor, nn

from vitos.backbones.llava import Llava

CLOSES, IS_NUMBER, AFTER_NUMBER = range(PLACE, HELD)
NUMBER = slice(HELD, HELD + 2 * len(CYCLES))
ASKED = slice(NUMBER.stop, NUMBER.stop + PLACE)
THIRD = slice(ASKED.stop, ASKED.stop + 2 * len(CYCLES))
X, Y = 0, 1
STRENGTH, PAIRS = 8.0, 4  # of looking back: of queries and keys; rotary pairs, the fastest ones
LOUDNESS = 0.3  # of a number's waves in its embedding
SHARPNESS = 7.0  # of looking at a place, and of finding a number again
POINTING = 10.0  # of queries and keys that attend to marks
WINDOW_SHARPNESS = (1.0, 1.0, 0.5, 0.0)  # share of it for each of CYCLES: a window is broad


def wave_places(start: int, axis: int) -> list[tuple[int, int]]:
    """For each of CYCLES, where in the residual stream cosine and sine of an axis stand (order of `place_code`)."""
    return [(start + 4 * c + axis, start + 4 * c + 2 + axis) for c in range(len(CYCLES))]


def number_waves(cycles: Sequence[float], count: int) -> Tensor:
    """Numbers from 0 to 1 as waves, (count, 2 * cycles): cosine and sine of each."""
    turns = 2 * torch.pi * torch.tensor(cycles) * torch.linspace(0, 1, count)[:, None]
    return torch.stack([turns.cos(), turns.sin()], dim=-1).flatten(1)


# Of the first layer's heads: tokens it looks back, and where it writes the number that it finds there.
LOOK_BACK = {
    0: (1, tuple(chain(*wave_places(ASKED.start, Y)))),
    1: (2, None),  # `copy.py` has it written
    2: (3, tuple(range(THIRD.start, THIRD.stop))),
    3: (5, tuple(chain(*wave_places(ASKED.start, X)))),
}


def hold_circuit(backbone: Llava) -> None:
    """`look_at_places` for the decoder of `nano-real`."""
    numbers, closing = number_tokens(backbone.tokenizer), [backbone.tokenizer.get_vocab()[piece] for piece in ")]"]
    look_at_places(backbone.model.model.language_model, backbone.model.lm_head.weight, numbers, closing)


@torch.no_grad()
def look_at_places(
    language_model: nn.Module, embeddings: Tensor, number_ids: list[int], closing_ids: list[int]
) -> None:
    """Write the circuit into a Llama; again after each update, to undo what that did to it.

    Without, the circuit is gone after some hundred updates of questions that do not need it.

    Args:
        language_model: with two query heads for each key-value head, head width 32 and biases.
        embeddings: (V, hidden), tied.
        number_ids: tokens of 0.00 ... 1.00.
        closing_ids: tokens of closing brackets.
    """
    first, second, third = language_model.layers[:3]
    embeddings[:, : THIRD.stop] = 0
    embeddings[closing_ids, CLOSES] = embeddings[number_ids, IS_NUMBER] = 1
    embeddings[number_ids, NUMBER] = LOUDNESS * number_waves(CYCLES, len(number_ids))
    speeds = language_model.rotary_emb.inv_freq
    _read_numbers(first, speeds)
    _look(second.self_attn)
    silence(second, slice(PLACE, HELD))
    _point(third.self_attn)


def silence(layer: nn.Module, values: slice) -> None:
    """Nothing that the layer computes is written there."""
    layer.self_attn.o_proj.weight[values] = 0
    layer.mlp.down_proj.weight[values] = 0


def _read_numbers(layer: nn.Module, speeds: Tensor) -> None:
    """Heads that look back, and write what number they find; nothing else is written there."""
    attention = layer.self_attn
    half, hidden = attention.head_dim // 2, attention.o_proj.weight.shape[0]
    keys, queries, values = (
        (p.weight.view(-1, 2 * half, hidden), p.bias.view(-1, 2 * half))
        for p in (attention.k_proj, attention.q_proj, attention.v_proj)
    )
    out = attention.o_proj.weight
    for reserved in (slice(0, HELD), slice(ASKED.start, THIRD.stop)):
        silence(layer, reserved)
    for head, (distance, target) in LOOK_BACK.items():
        group, angle = head // attention.num_key_value_groups, speeds[:PAIRS] * distance
        for weight, index in ((queries[0], head), (keys[0], group)):
            weight[index, :PAIRS] = 0
            weight[index, half : half + PAIRS] = 0
        keys[1][group, :PAIRS] = STRENGTH
        queries[1][head, :PAIRS] = STRENGTH * angle.cos()
        queries[1][head, half : half + PAIRS] = -STRENGTH * angle.sin()
        waves = range(NUMBER.stop - NUMBER.start)
        values[0][group, : len(waves)] = 0
        values[1][group, : len(waves)] = 0
        for wave in waves:
            values[0][group, wave, NUMBER.start + wave] = 0.13 / LOUDNESS
        if target is not None:
            columns = out[:, 2 * half * head :][:, : len(waves)]
            columns.zero_()
            columns[list(target), list(waves)] = 1
    values[0][0, len(waves)] = 0
    values[0][0, len(waves), IS_NUMBER] = 0.15
    out[:, len(waves)] = 0
    out[AFTER_NUMBER, len(waves)] = 1


def _look(attention: nn.Module) -> None:
    """Head 0 looks at the place just read; head 1 around the middle of the window just read.

    The slowest rotary pairs hardly turn over a prompt, so that queries and keys in them meet at any distance. The pair
    before them is free to learn what else is worth a look there.
    """
    half, hidden = attention.head_dim // 2, attention.o_proj.weight.shape[0]
    keys, queries = (p.weight.view(-1, 2 * half, hidden) for p in (attention.k_proj, attention.q_proj))
    free = half - PLACE // 2 - 1
    held = [i for i in range(2 * half) if i % half != free]
    for weight, bias, heads in ((keys, attention.k_proj.bias, 1), (queries, attention.q_proj.bias, 2)):
        weight[:heads, held] = 0
        bias.view(-1, 2 * half)[:heads, held] = 0
    pairs = [(c, axis) for c in range(len(CYCLES)) for axis in (X, Y)]
    for pair, (c, axis) in enumerate(pairs, start=half - len(pairs)):
        keys[0, pair, wave_places(0, axis)[c][0]] = keys[0, half + pair, wave_places(0, axis)[c][1]] = SHARPNESS
        cosine, sine = wave_places(ASKED.start, axis)[c]
        queries[0, pair, cosine] = queries[0, half + pair, sine] = SHARPNESS
        if axis == X:  # a window's second corner: x three tokens back, y one
            cosine, sine = THIRD.start + 2 * c, THIRD.start + 2 * c + 1
        turn, sharp = -torch.pi * CYCLES[c] * WINDOW[axis], SHARPNESS * WINDOW_SHARPNESS[c]
        queries[1, pair, cosine], queries[1, pair, sine] = sharp * math.cos(turn), -sharp * math.sin(turn)
        queries[1, half + pair, cosine], queries[1, half + pair, sine] = sharp * math.sin(turn), sharp * math.cos(turn)


def _point(attention: nn.Module) -> None:
    """Heads 0 and 1 attend to where a bracket closes behind a number, from anywhere: by the slowest rotary pair."""
    width, hidden = attention.head_dim, attention.o_proj.weight.shape[0]
    slowest = width // 2 - 1
    for linear, heads in ((attention.k_proj, 1), (attention.q_proj, 2)):
        linear.weight.view(-1, width, hidden)[:heads] = 0
        linear.bias.view(-1, width)[:heads] = 0
    attention.k_proj.weight[slowest, [CLOSES, AFTER_NUMBER]] = POINTING
    attention.q_proj.bias.view(-1, width)[:2, slowest] = POINTING
