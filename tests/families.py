"""The model families, each as a tiny model. A new family joins the shared suite with one line in `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny_mdlm import open_up, spread_orders
from transformers import LlamaConfig

from hf_diffusion import (
    ARMDConfig,
    ARMDForMaskedDiffusion,
    CausalStreamsConfig,
    CausalStreamsForMaskedDiffusion,
    LoMDMConfig,
    LoMDMForMaskedDiffusion,
    MDLMConfig,
    MDLMForMaskedDiffusion,
)


VOCAB_SIZE = 23
NUM_TOKENS = 22
"""Ids that a text may hold in every family: some have a mask token in their vocabulary, the last one."""


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        settings: of the config, besides the shared ones.
        strategies: arguments of `generate`, one set for each way to draw text.
        logits_when_drawn: maps (model, sequences, steps, number of given tokens) to the logits [batch, length,
            vocab_size] from which each token was drawn, without `generate` or a cache.
        make_config: maps the settings to a config; the class itself if not given.
        wrong_settings: (name, value) that the config refuses.
        prepare: changes the weights of a fresh model, if it predicts nothing yet.
        loss_inputs: sets of arguments with which the loss reaches every parameter.
        loss_is_drawn: `labels` gives an estimate, from random times and masks.
        lora_layers: names of the linear maps that PEFT adapts if it is not told which.
    """

    config_class: type
    model_class: type
    settings: dict
    strategies: tuple[dict, ...]
    logits_when_drawn: Callable
    prepare: Callable = lambda model: None
    loss_inputs: tuple[dict, ...] = field(default=({},))
    loss_is_drawn: bool = False
    lora_layers: frozenset = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"})
    make_config: Callable | None = None
    wrong_settings: tuple = (("num_attention_heads", 3), ("eos_token_id", VOCAB_SIZE), ("max_position_embeddings", 0))

    def config(self, **overrides):
        shared = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
        make_config = self.make_config or self.config_class
        return make_config(**{**shared, **self.settings, **overrides})

    def model(self, dtype=torch.float32, **overrides):
        torch.manual_seed(1)
        model = self.model_class(self.config(**overrides))
        self.prepare(model)
        return model.to(dtype).eval()

    def loss(self, model, input_ids, labels=None, **inputs):
        """The training objective; the same masks at every call where it is drawn."""
        if self.loss_is_drawn:
            inputs["generator"] = torch.Generator().manual_seed(5)
        return model(input_ids, labels=input_ids if labels is None else labels, **inputs).loss


def in_order(model, sequences, steps, num_given):
    """ARMD reads a whole text at once in the order in which it was drawn."""
    given = torch.arange(num_given).expand(len(sequences), -1)
    return model(sequences, block_index=torch.cat([given, steps[:, num_given:] + num_given], dim=1)).logits


def pass_by_pass(model, sequences, steps, num_given):
    """A bidirectional model reads the canvas as it stood before each pass."""
    logits = torch.empty(*sequences.shape, VOCAB_SIZE, dtype=model.dtype)
    for step in range(int(steps.max()) + 1):
        canvas = sequences.masked_fill(steps >= step, model.config.mask_token_id)
        logits = torch.where((steps == step)[..., None], model(canvas).logits, logits)
    return logits


LEFT_TO_RIGHT = {"strategy": "autoregressive"}
STRIDED = {"strategy": "strided", "num_streams": 3}
BLOCKS = {"strategy": "semi_autoregressive", "block_length": 4, "max_denoising_steps": 2}
ANCESTRAL = {"strategy": "ancestral", "max_denoising_steps": 6}
FIRST_HITTING = {"strategy": "first_hitting"}
# Large weights: a tiny network at the usual scale is so close to uniform that errors would not show.
ARMD_SETTINGS = {"prefix_encoding_size": 16, "initializer_range": 0.3}
ARMD_STRATEGIES = (LEFT_TO_RIGHT, STRIDED, BLOCKS, ANCESTRAL, FIRST_HITTING)
# In an order in which some left neighbours are unknown, and in one in which none is.
BACKWARDS = ({"block_index": torch.arange(9).flip(0).expand(2, 9)}, {})
MDLM_SETTINGS = {"conditioning_size": 8, "residual_dropout": 0.0}
MDLM_STRATEGIES = (
    *(LEFT_TO_RIGHT, STRIDED, ANCESTRAL, FIRST_HITTING),
    {**BLOCKS, "block_strategy": "ancestral"},
    {**BLOCKS, "block_strategy": "spread"},
    {"strategy": "confidence", "confidence_threshold": 0.5},
    {"strategy": "entropy", "entropy_bound": 0.5},
    {"strategy": "margin", "max_denoising_steps": 3},
)
BLOCK_STRATEGIES = tuple(
    {"strategy": "semi_autoregressive", "block_strategy": name} for name in ("spread", "first_hitting", "entropy")
)


def streams_of_a_llama(**settings):
    own = ("later_text", "mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache")
    inside = {"intermediate_size": 128, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    inside.update({name: value for name, value in settings.items() if name not in own})
    own_settings = {name: value for name, value in settings.items() if name in own}
    config = LlamaConfig(**inside)
    rotary_layers = [True] * config.num_hidden_layers
    return CausalStreamsConfig(causal_lm_config=config, rotary_layers=rotary_layers, **own_settings)


FAMILIES = {
    "armd": Family(ARMDConfig, ARMDForMaskedDiffusion, ARMD_SETTINGS, ARMD_STRATEGIES, in_order, loss_inputs=BACKWARDS),
    "armd_left_neighbour": Family(
        ARMDConfig,
        ARMDForMaskedDiffusion,
        {**ARMD_SETTINGS, "left_neighbour": True},
        ARMD_STRATEGIES,
        in_order,
        loss_inputs=BACKWARDS,
    ),
    "mdlm": Family(
        MDLMConfig,
        MDLMForMaskedDiffusion,
        MDLM_SETTINGS,
        MDLM_STRATEGIES,
        pass_by_pass,
        open_up,
        loss_is_drawn=True,
    ),
    "mdlm_blocks": Family(
        MDLMConfig,
        MDLMForMaskedDiffusion,
        {**MDLM_SETTINGS, "block_size": 4},
        (LEFT_TO_RIGHT, *BLOCK_STRATEGIES),
        pass_by_pass,
        open_up,
        loss_is_drawn=True,
    ),
    "lomdm": Family(
        LoMDMConfig,
        LoMDMForMaskedDiffusion,
        MDLM_SETTINGS,
        (*MDLM_STRATEGIES, {"strategy": "velocity"}, {**ANCESTRAL, "learned_order": False}),
        pass_by_pass,
        lambda model: (open_up(model), spread_orders(model)),
        loss_is_drawn=True,
    ),
    "causal_streams": Family(
        CausalStreamsConfig,
        CausalStreamsForMaskedDiffusion,
        {"initializer_range": 0.3},
        ARMD_STRATEGIES,
        in_order,
        loss_inputs=BACKWARDS,
        lora_layers=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
        make_config=streams_of_a_llama,
        wrong_settings=(("later_text", "upside down"), ("eos_token_id", VOCAB_SIZE)),
    ),
}
