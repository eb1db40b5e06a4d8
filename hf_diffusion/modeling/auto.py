"""Registration of the families with transformers' Auto classes; importing `hf_diffusion` does it."""

from collections import OrderedDict
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping

from .configuration_armd import ARMDConfig
from .configuration_lomdm import LoMDMConfig
from .configuration_mdlm import MDLMConfig
from .configuration_mdlm_ar import MDLMARConfig
from .modeling_armd import ARMDForMaskedDiffusion
from .modeling_armd_causal import ARMDForCausalLM
from .modeling_lomdm import LoMDMForMaskedDiffusion
from .modeling_mdlm import MDLMForMaskedDiffusion
from .modeling_mdlm_ar import MDLMARForCausalLM


class AutoModelForMaskedDiffusion(_BaseAutoModelClass):
    """Leads to the class of a family whose `forward` fills masked positions, and whose `generate` has strategies."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


FAMILIES = (
    (ARMDConfig, ARMDForMaskedDiffusion, ARMDForCausalLM),
    (MDLMConfig, MDLMForMaskedDiffusion, MDLMForMaskedDiffusion),
    (LoMDMConfig, LoMDMForMaskedDiffusion, LoMDMForMaskedDiffusion),
)
"""(configuration, model, what `AutoModelForCausalLM` leads to) of every family. All of them can `generate`.

A causal convention (row n predicts token n + 1) is there only where the model has one; the others stay as they are.
"""


def register() -> None:
    """Register every family, and the autoregressive baseline; safe to call twice."""
    for config_class, model_class, causal_class in FAMILIES:
        _register(config_class, model_class, AutoModel, AutoModelForMaskedLM, AutoModelForMaskedDiffusion)
        _register(config_class, causal_class, AutoModelForCausalLM)
    _register(MDLMARConfig, MDLMARForCausalLM, AutoModel, AutoModelForCausalLM)


def _register(config_class: Any, model_class: Any, *auto_classes: Any) -> None:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in auto_classes:
        auto_class.register(config_class, model_class, exist_ok=True)


__all__ = ["AutoModelForMaskedDiffusion"]
