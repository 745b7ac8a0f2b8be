"""Tokens that must never be sampled, as in the torch engine: a logits processor for all requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor


class BannedTokens(LogitsProcessor):
    """Bans `additional_config={"vitos": {"banned_token_ids": [...]}}`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        options = (vllm_config.additional_config or {}).get("vitos", {})
        self.banned = torch.tensor(options.get("banned_token_ids", []), dtype=torch.long, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        return logits.index_fill_(-1, self.banned, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing to do: the bans are the same for every batch."""
