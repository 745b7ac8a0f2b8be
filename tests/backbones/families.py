"""The table of model families: a tiny random model of each architecture, and the library's own way to run it.

A new family is one row in `FAMILIES`; `test_invariants.py` does the rest. Image processors have the settings of the
published checkpoints, except where a row says that the size must differ. Weights are large (N(0, 0.15)), so that a
wrong position or a lost token changes the logits visibly and greedy text varies. Numbers are float64, so that "equal"
and "nearly equal" can be told apart.

The models are built in `family_*.py`. `library_inputs` and `library_run` (`family.py`) are the independent side: the
library's processor makes text and pixels, and the unmodified model computes placeholders, visual tokens and positions.
"""

from __future__ import annotations

from tests.backbones.family import Family
from tests.backbones.family_gemma3 import gemma3, gemma3_panning, gemma3_processor
from tests.backbones.family_internvl import internvl, internvl3_5, internvl_processor
from tests.backbones.family_llava import huatuo_vision, llava_1_5, llava_dinov2, llava_med, llava_processor
from tests.backbones.family_qwen import (
    nano,
    qwen2_5_vl,
    qwen2_5_vl_processor,
    qwen3_vl,
    qwen3_vl_moe,
    qwen3_vl_processor,
    windowed,
)

FAMILIES = (
    Family("qwen2_5_vl", qwen2_5_vl, qwen2_5_vl_processor),
    Family("qwen2_5_vl, nano", nano, qwen2_5_vl_processor),
    Family("qwen2_5_vl, merge 3", windowed, qwen2_5_vl_processor),
    Family("qwen3_vl", qwen3_vl, qwen3_vl_processor, sizes=((200, 301), (250, 40), (17, 200))),
    Family("qwen3_vl_moe", qwen3_vl_moe, qwen3_vl_processor, sizes=((200, 301), (250, 40), (17, 200))),
    Family("llava, LLaVA-1.5", llava_1_5, llava_processor, sizes=((401, 600), (250, 40), (128, 128))),
    Family("llava, HuatuoGPT-Vision", huatuo_vision, llava_processor, sizes=((401, 600), (250, 41), (17, 200))),
    Family("llava, LLaVA-Med", llava_med, llava_processor, sizes=((350, 301), (250, 40), (40, 333))),
    Family("llava, DINOv2", llava_dinov2, llava_processor, sizes=((350, 301), (250, 40), (40, 333))),
    Family("gemma3", gemma3, gemma3_processor),
    Family("gemma3, pan-and-scan", gemma3_panning, gemma3_processor, sizes=((600, 301), (299, 310), (258, 800))),
    Family("internvl", internvl, internvl_processor, sizes=((460, 225), (33, 97), (226, 223), (700, 100))),
    Family("internvl, Qwen3", internvl3_5, internvl_processor, sizes=((460, 225), (226, 223), (97, 200))),
)
FAMILIES_BY_NAME = {family.name: family for family in FAMILIES}
