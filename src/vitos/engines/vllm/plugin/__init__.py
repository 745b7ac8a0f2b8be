"""vLLM plug-in: models that take any subset of an image's visual tokens, each at its dense position.

vLLM finds `register` by its entry point (`vllm.general_plugins`) in every process that it starts. Nothing in vLLM is
changed: the models have their own names, and a user chooses one with `hf_overrides={"architectures": [...]}`.

Read in this order:

- `request.py`: what a client may ask for (which tokens to keep, what becomes of the others). Without vLLM.
- `sparse.py`: what the models of all families share; `llava.py`, `internvl.py`, `qwen2_5_vl.py`, `qwen3_vl.py` (both
  with `qwen.py`): the families. `positions.py` and `rope.py` place the kept tokens.
- `prompts.py`: a `Prompt` of ours as vLLM takes it, past its processors; this is how training samples.
- `bans.py` and `images.py`: tokens that are never sampled, and images that are encoded once.

A family names its model for vLLM in its own file (`Backbone.vllm_model`); this package keeps no list of families.
"""

from __future__ import annotations

import logging
import pkgutil

logger = logging.getLogger(__name__)

TESTED = "0.32"
"""Minor version of vLLM that the plug-in is written for and tested with: it overrides private methods."""
READ = ("0.33",)
"""Further minor versions, in whose sources these methods are the same; the plug-in has not been run with them.

`python -m tests.engines.vllm.plugin.test_private WHEEL` compares them.
"""


def register() -> None:
    """Register the models of all families with vLLM, by name: the models themselves are not imported here.

    Under a version of vLLM that is neither tested nor read, nothing is registered; a warning says so in both cases.
    """
    import vllm
    from vllm import ModelRegistry

    minor = vllm.__version__.split("+")[0].rpartition(".")[0]
    if minor not in (TESTED, *READ):
        logger.warning(
            "vitos is made for vLLM %s and this is %s: its sparse models are not available", TESTED, vllm.__version__
        )
        return
    if minor != TESTED:
        logger.warning(
            "vitos is tested with vLLM %s and has not been run with %s, whose sources only were compared; check its "
            "answers against the torch engine",
            TESTED,
            vllm.__version__,
        )
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitos.backbones import families

    for family in families().values():
        if (model := family.vllm_model) is not None:
            ModelRegistry.register_model(model.architecture, model.model)
            if model.config:
                MODELS_CONFIG_MAP[model.architecture] = pkgutil.resolve_name(model.config)


def architecture(model_type: str) -> str:
    """The name under which vLLM knows the sparse model of a family.

    Example:
        >>> architecture("llava")
        'VitosLlavaForConditionalGeneration'

    Raises:
        ValueError: for a family that vLLM cannot run.
    """
    from vitos.backbones import families

    models = {
        name: family.vllm_model
        for name, family in families().items()
        if family.vllm_model is not None and family.vllm_model.runs(name)
    }
    if model_type not in models:
        raise ValueError(
            f"no vLLM model for {model_type!r}; the plug-in has {', '.join(sorted(models))}; use the torch engine"
        )
    return models[model_type].architecture
