"""Masked-diffusion language models in the Hugging Face stack.

Importing this package registers its model families with transformers' Auto classes, and tells PEFT what to adapt in
them.
"""

from .generation.configuration import DiffusionGenerationConfig
from .modeling.approximate_cache_mdlm import ApproximateMDLMCache
from .modeling.auto import AutoModelForMaskedDiffusion, register
from .modeling.cache_armd import ARMDCache
from .modeling.cache_mdlm import MDLMCache
from .modeling.cache_streams import CausalStreamsCache
from .modeling.configuration_armd import ARMDConfig
from .modeling.configuration_lomdm import LoMDMConfig
from .modeling.configuration_mdlm import MDLMConfig
from .modeling.configuration_mdlm_ar import MDLMARConfig
from .modeling.configuration_streams import CausalStreamsConfig
from .modeling.lora_targets import register_lora_targets
from .modeling.modeling_armd import ARMDForMaskedDiffusion
from .modeling.modeling_armd_causal import ARMDForCausalLM
from .modeling.modeling_lomdm import LoMDMForMaskedDiffusion
from .modeling.modeling_mdlm import MDLMForMaskedDiffusion
from .modeling.modeling_mdlm_ar import MDLMARForCausalLM
from .modeling.modeling_streams import CausalStreamsForMaskedDiffusion
from .modeling.packed_linear import pack_linear_layers, unpack_linear_layers


__version__ = "0.1.0"

__all__ = [
    "ARMDCache",
    "ARMDConfig",
    "ARMDForCausalLM",
    "ARMDForMaskedDiffusion",
    "ApproximateMDLMCache",
    "AutoModelForMaskedDiffusion",
    "CausalStreamsCache",
    "CausalStreamsConfig",
    "CausalStreamsForMaskedDiffusion",
    "DiffusionGenerationConfig",
    "LoMDMConfig",
    "LoMDMForMaskedDiffusion",
    "MDLMARConfig",
    "MDLMARForCausalLM",
    "MDLMCache",
    "MDLMConfig",
    "MDLMForMaskedDiffusion",
    "__version__",
    "pack_linear_layers",
    "unpack_linear_layers",
]

register()
register_lora_targets()
