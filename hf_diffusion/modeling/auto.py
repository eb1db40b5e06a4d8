"""Registration of the families with transformers' Auto classes; importing `hf_diffusion` does it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_armd import ARMDConfig
from .configuration_lomdm import LoMDMConfig
from .configuration_mdlm import MDLMConfig
from .configuration_mdlm_ar import MDLMARConfig
from .modeling_armd import ARMDForMaskedDiffusion
from .modeling_lomdm import LoMDMForMaskedDiffusion
from .modeling_mdlm import MDLMForMaskedDiffusion
from .modeling_mdlm_ar import MDLMARForCausalLM


FAMILIES = (
    (ARMDConfig, ARMDForMaskedDiffusion),
    (MDLMConfig, MDLMForMaskedDiffusion),
    (LoMDMConfig, LoMDMForMaskedDiffusion),
)
"""(configuration, model) of every family: what `AutoModel` and `AutoModelForMaskedLM` lead to, and can `generate`."""

CAUSAL_BASELINES = ((MDLMARConfig, MDLMARForCausalLM),)
"""(configuration, model) of ordinary causal models that a family is compared with."""


def register() -> None:
    """Register every family; safe to call twice."""
    for models, auto_classes in (
        (FAMILIES, (AutoModel, AutoModelForMaskedLM)),
        (CAUSAL_BASELINES, (AutoModel, AutoModelForCausalLM)),
    ):
        for config_class, model_class in models:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            for auto_class in auto_classes:
                auto_class.register(config_class, model_class, exist_ok=True)
