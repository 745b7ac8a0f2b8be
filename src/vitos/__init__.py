"""vitos: dual-stream reinforcement learning for medical vision-language models that answer from sparse visual tokens.

    from vitos import SparseVLM
    vlm = SparseVLM.from_pretrained("nano")
    scan = vlm.encode("slice.png")
    finding = vlm.ask(scan, "What is the finding in the left lung?\\nA. nodule\\nB. cyst")

For research use only; not a medical device. Importing `vitos` is cheap: the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Box": "vitos.geometry",
    "DualStreamConfig": "vitos.rl.config",
    "DualStreamTrainer": "vitos.rl.trainer",
    "ExtraReward": "vitos.rl.rewards",
    "Finding": "vitos.policy",
    "Record": "vitos.data.record",
    "RewardWeights": "vitos.rl.rewards",
    "Scan": "vitos.policy",
    "SparseVLM": "vitos.policy",
    "load_recipe": "vitos.config",
    "read_records": "vitos.data.readers",
}

if TYPE_CHECKING:
    from vitos.config import load_recipe as load_recipe
    from vitos.data.readers import read_records as read_records
    from vitos.data.record import Record as Record
    from vitos.geometry import Box as Box
    from vitos.policy import Finding as Finding
    from vitos.policy import Scan as Scan
    from vitos.policy import SparseVLM as SparseVLM
    from vitos.rl.config import DualStreamConfig as DualStreamConfig
    from vitos.rl.rewards import ExtraReward as ExtraReward
    from vitos.rl.rewards import RewardWeights as RewardWeights
    from vitos.rl.trainer import DualStreamTrainer as DualStreamTrainer

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vitos' has no attribute {name!r}")
