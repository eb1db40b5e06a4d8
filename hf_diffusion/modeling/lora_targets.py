"""The layers that PEFT's `LoraConfig()` adapts in each family, if no `target_modules` are given.

PEFT looks them up by `model_type` in a dictionary of its own, and asks the model nothing. They are put there as soon as
somebody imports PEFT, which takes longer than importing this package.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .configuration_armd import ARMDConfig
from .configuration_lomdm import LoMDMConfig
from .configuration_mdlm import MDLMConfig
from .configuration_mdlm_ar import MDLMARConfig
from .configuration_streams import CausalStreamsConfig


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
"""Every linear map of a transformer layer; in LoMDM also those of the heads that learn the order."""

ATTENTION_LAYERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "qkv_proj",
    "query_key_value",
    "dense",
    "c_attn",
)
"""The linear maps of attention, by all the names that causal models give them: attention alone is told of text on the
right, so it has to learn what that is."""

LORA_TARGETS = {
    **{config.model_type: list(LINEAR_LAYERS) for config in (ARMDConfig, MDLMConfig, LoMDMConfig, MDLMARConfig)},
    CausalStreamsConfig.model_type: list(ATTENTION_LAYERS),
}
"""Names of modules to adapt, by `model_type`."""

PEFT_TABLES = "peft.utils.constants"


def register_lora_targets() -> None:
    """Tell PEFT, now or when it is imported; safe to call twice. What somebody else has put there stays."""
    if PEFT_TABLES in sys.modules:
        _fill(sys.modules[PEFT_TABLES])
    elif not any(isinstance(finder, _FillAtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FillAtImport())


def _fill(tables: ModuleType) -> None:
    for model_type, targets in LORA_TARGETS.items():
        tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, targets)


class _FillAtImport(MetaPathFinder):
    """Finds PEFT's tables as Python does, once, and fills them as soon as they are there."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != PEFT_TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                _fill(module)

            spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]
        return spec


__all__ = ["LORA_TARGETS", "register_lora_targets"]
