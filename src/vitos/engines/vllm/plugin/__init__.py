"""vLLM plug-in: models whose images keep any subset of their visual tokens, each at its dense position.

vLLM finds `register` by its entry point (`vllm.general_plugins`) in every process it starts. Nothing of vLLM is
changed: the models have names of their own and are chosen with `hf_overrides={"architectures": [...]}`.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

TESTED = "0.32"
"""Minor version of vLLM that the plug-in is written for and tested with: it overrides private methods."""

ARCHITECTURES = {
    "qwen2_5_vl": ("VitosQwen2_5_VLForConditionalGeneration", "vitos.engines.vllm.plugin.qwen2_5_vl:VitosQwen25VL"),
    "llava": ("VitosLlavaForConditionalGeneration", "vitos.engines.vllm.plugin.llava:VitosLlava"),
}
"""`model_type` of a checkpoint → the name of its model in vLLM, and where the class is."""


def register() -> None:
    """Tell vLLM the models; imports none of them. Another minor version of vLLM is left alone, and told so."""
    import vllm
    from vllm import ModelRegistry

    if vllm.__version__.split("+")[0].rpartition(".")[0] != TESTED:
        logger.warning("vitos knows vLLM %s, this is %s: its sparse models are not there", TESTED, vllm.__version__)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitos.engines.vllm.plugin.rope import ThreeAxes

    for name, place in ARCHITECTURES.values():
        ModelRegistry.register_model(name, place)
    MODELS_CONFIG_MAP[ARCHITECTURES["llava"][0]] = ThreeAxes


def architecture(model_type: str) -> str:
    """The name under which vLLM knows the sparse model of a family.

    Raises:
        ValueError: for a family that the plug-in does not have.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"no vLLM model for {model_type!r}; the plug-in has {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type][0]
