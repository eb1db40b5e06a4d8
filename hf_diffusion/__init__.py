"""Masked-diffusion language models in the Hugging Face stack.

Importing this package registers its model families with transformers' Auto classes.
"""

from .generation.configuration import DiffusionGenerationConfig
from .modeling.auto import register
from .modeling.cache_armd import ARMDCache
from .modeling.configuration_armd import ARMDConfig
from .modeling.modeling_armd import ARMDForMaskedDiffusion
from .modeling.packed_linear import pack_linear_layers, unpack_linear_layers


__version__ = "0.1.0"

__all__ = [
    "ARMDCache",
    "ARMDConfig",
    "ARMDForMaskedDiffusion",
    "DiffusionGenerationConfig",
    "__version__",
    "pack_linear_layers",
    "unpack_linear_layers",
]

register()
