"""vitos: dual-stream reinforcement learning for medical vision-language models that answer from sparse visual tokens.

    from vitos import SparseVLM
    vlm = SparseVLM.from_pretrained("nano")
    scan = vlm.encode("slice.png")
    finding = vlm.ask(scan, "What is the finding in the left lung?\\nA. nodule\\nB. cyst")

The names below are the public interface; each has an example in its docstring (`help(vitos.SparseVLM)`). To extend
vitos, see `vitos.policy.plans.Plan`, `vitos.backbones.Backbone`, `vitos.eval.selectors` and `vitos.eval.datasets`.
docs/architecture.md is the map of all packages. Importing `vitos` is fast, because a name loads on first use.

For research use only; not a medical device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitos.core.version import __version__

_WHERE = {
    "Box": "vitos.core.geometry",
    "DualStreamConfig": "vitos.rl.config",
    "DualStreamTrainer": "vitos.rl.trainer",
    "Evaluation": "vitos.eval.evaluate",
    "ExtraReward": "vitos.rl.rewards",
    "Finding": "vitos.policy.types",
    "Limits": "vitos.policy.plans",
    "Record": "vitos.core.record",
    "RewardWeights": "vitos.rl.rewards",
    "Scan": "vitos.policy.types",
    "SparseVLM": "vitos.policy.vlm",
    "evaluate": "vitos.eval.evaluate",
    "load_recipe": "vitos.config.recipe",
    "read_records": "vitos.data.readers",
}

if TYPE_CHECKING:
    from vitos.config.recipe import load_recipe as load_recipe
    from vitos.core.geometry import Box as Box
    from vitos.core.record import Record as Record
    from vitos.data.readers import read_records as read_records
    from vitos.eval.evaluate import Evaluation as Evaluation
    from vitos.eval.evaluate import evaluate as evaluate
    from vitos.policy.plans import Limits as Limits
    from vitos.policy.types import Finding as Finding
    from vitos.policy.types import Scan as Scan
    from vitos.policy.vlm import SparseVLM as SparseVLM
    from vitos.rl.config import DualStreamConfig as DualStreamConfig
    from vitos.rl.rewards import ExtraReward as ExtraReward
    from vitos.rl.rewards import RewardWeights as RewardWeights
    from vitos.rl.trainer import DualStreamTrainer as DualStreamTrainer

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vitos' has no attribute {name!r}")
