"""Size of an optimizer's state, by the name that `trainer.optim` has in `transformers.TrainingArguments`."""

from __future__ import annotations

_BLOCK = 4 / 256  # bitsandbytes: one float32 scale for 256 entries
# Name → (values per weight in the weight's own number format, bytes per weight in another).
_STATES: dict[str, tuple[float, float]] = {
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "adamw_apex_fused": (2, 0),
    "adamw_anyprecision": (2, 0),
    "stable_adamw": (2, 0),
    "lion_32bit": (0, 4),
    "adagrad": (1, 0),
    "rmsprop": (1, 0),
    "sgd": (0, 0),
    "adafactor": (0, 0.02),  # a row and a column per matrix
    "adamw_bnb_8bit": (0, 2 * (1 + _BLOCK)),
    "adamw_8bit": (0, 2 * (1 + _BLOCK)),
    "lion_8bit": (0, 1 + _BLOCK),
    "paged_adamw_32bit": (0, 0),  # in the machine's memory
    "paged_adamw_8bit": (0, 0),
    "paged_lion_32bit": (0, 0),
    "paged_lion_8bit": (0, 0),
}


def state_bytes(name: str, weight_bytes: int) -> float:
    """Bytes of the optimizer's state per trained weight.

    PyTorch's optimizers keep their moments in the number format of the weight.

    >>> state_bytes("adamw_torch_fused", 4), state_bytes("adamw_torch_fused", 2)
    (8.0, 4.0)

    Raises:
        ValueError: for an optimizer whose state is not known here.
    """
    if name not in _STATES:
        raise ValueError(f"trainer.optim: the size of the state of {name!r} is not known; known: {', '.join(_STATES)}")
    values, other = _STATES[name]
    return float(values * weight_bytes + other)
