"""Names that every layer shares."""

from __future__ import annotations

from typing import Literal

PlanName = Literal["two_pass", "gather", "coarse", "dense", "crop"]
"""How a question is answered; see `vitos.policy.plans`."""
