"""Registration of the families with transformers' Auto classes; importing `hf_diffusion` does it."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from .configuration_armd import ARMDConfig
from .modeling_armd import ARMDForMaskedDiffusion


FAMILIES = ((ARMDConfig, ARMDForMaskedDiffusion),)
"""(configuration, model) of every family. All Auto classes lead to a model that can `generate`."""


def register() -> None:
    """Register every family; safe to call twice."""
    for config_class, model_class in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForMaskedLM):
            auto_class.register(config_class, model_class, exist_ok=True)
