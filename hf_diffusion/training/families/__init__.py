"""The model families that can be trained. A new one joins with a file here and its name in this one."""

from ..recipe import TrainingRecipe
from .armd import ARMDRecipe
from .causal_streams import CausalStreamsRecipe
from .llama import LlamaRecipe
from .lomdm import LoMDMRecipe
from .mdlm import MDLMRecipe


FAMILIES: dict[str, type[TrainingRecipe]] = {
    recipe.family: recipe
    for recipe in (
        ARMDRecipe,
        MDLMRecipe,
        LoMDMRecipe,
        LlamaRecipe,
        CausalStreamsRecipe,
    )
}

__all__ = ["FAMILIES", "ARMDRecipe", "CausalStreamsRecipe", "LlamaRecipe", "LoMDMRecipe", "MDLMRecipe"]
