"""Which strategies and settings go with which family, each refusal with its reason."""

from typing import Any

from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig

from .configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig
from .fields import EFFECTIVE_FIELDS
from .strategies import LEARNED_ORDERS, SEMI_AUTOREGRESSIVE
from .strategies.filling import Strategy


def check_compatible(model: Any, strategy: Strategy, config: DiffusionGenerationConfig, in_call: set[str]) -> None:
    """Raise ValueError for a setting that the model cannot act on.

    Args:
        model: a `DiffusionGenerationMixin`.
        strategy: what fills the canvas, or each of its blocks.
        in_call: names of the arguments that the user has passed to `generate`.
    """
    name = type(model).__name__
    if model.reads_block_index:
        reason = f"{name} reads tokens in the order in which they are drawn, which is therefore laid down beforehand"
        if not strategy.planned:
            raise ValueError(
                f'The strategy "{strategy.name}" chooses positions as it goes, but {reason}. Take "strided", '
                '"semi_autoregressive" or "first_hitting".'
            )
        _refuse(config, ("remasking", "reference_sampler"), reason)
    if model.has_exact_cache:
        _refuse(config, ("approximate_cache",), f"the cache of {name} is exact")
        _refuse(config, ("sliding_window",), f"{name} reads all of the text that it has written")
    elif "use_cache" in in_call and config.use_cache:
        raise ValueError(
            f"`use_cache`=True: every position of {name} reads every other one, so no pass can use what an earlier one "
            'computed. Leave it out; `approximate_cache` (with `strategy="semi_autoregressive"`) is an approximation '
            "that reports its error."
        )
    block_size = model.generation_block_size
    if block_size is not None:
        if config.strategy not in (SEMI_AUTOREGRESSIVE, "autoregressive"):
            raise ValueError(
                f'`strategy="{config.strategy}"`: this model draws blocks of {block_size} positions from left to right.'
                f' Set `strategy="{SEMI_AUTOREGRESSIVE}"`, and `block_strategy` for the order inside a block.'
            )
        if config.block_length not in (None, block_size):
            raise ValueError(
                f"`block_length` ({config.block_length}) must be the model's own `block_size` ({block_size}). Leave it "
                "out."
            )
    if model.learns_order and strategy.name in LEARNED_ORDERS and config.learned_order is not False:
        reason = f"{name} needs all positions in every pass to say in which order they are revealed"
        _refuse(config, ("approximate_cache",), reason)
    if config.watermarking_config is not None:
        _check_watermark(strategy, config)
    if is_guided(config) and block_size is not None:
        raise ValueError(
            f"`guidance_scale`={config.guidance_scale!r}: {name} draws blocks that are counted from the start of the "
            "text, and a text with another beginning has others. Leave it out."
        )
    if (config.remasking is None) != (config.remasking_strength is None):
        raise ValueError(
            f"`remasking` ({config.remasking!r}) and `remasking_strength` ({config.remasking_strength!r}) go together: "
            "set both or neither."
        )
    if config.reference_sampler is not None:
        _check_reference_sampler(model, config)


def is_guided(config: DiffusionGenerationConfig) -> bool:
    """Whether texts are read with another beginning as well."""
    return config.guidance_scale is not None and config.guidance_scale != 1


def _check_watermark(strategy: Strategy, config: DiffusionGenerationConfig) -> None:
    if strategy.name != "autoregressive":
        raise ValueError(
            f'`watermarking_config` with `strategy="{config.strategy}"`: a watermark is found again by the tokens on '
            'the left of each, which must be known when it is drawn. Set `strategy="autoregressive"`.'
        )
    if isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig):
        raise ValueError(
            "`watermarking_config` is a SynthID watermark, which keeps a state for the whole batch, and rows that have "
            "ended leave it here. Take `WatermarkingConfig`."
        )


REFERENCE_FIELDS = {
    *("reference_sampler", "strategy", "block_strategy", "block_length", "sliding_window", "max_denoising_steps"),
    *("learned_order", "max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "use_cache"),
}
"""Fields that the reference's samplers act on, or whose defaults say what they do."""


def _check_reference_sampler(model: Any, config: DiffusionGenerationConfig) -> None:
    if model.generation_block_size is not None:
        raise ValueError(
            f"`reference_sampler`={config.reference_sampler!r} is MDLM's, which reads text in both directions; this "
            "model reads blocks from left to right. Leave it out."
        )
    defaults = {**DIFFUSION_FIELDS, **DiffusionGenerationConfig._get_default_generation_params()}
    for name in sorted(EFFECTIVE_FIELDS - REFERENCE_FIELDS):
        value = getattr(config, name)
        if value is not None and value != defaults.get(name):
            raise ValueError(f"`{name}`={value!r}: the reference sampler has nothing of the kind. Set it to None.")
    windows = config.sliding_window and config.reference_sampler == "ddpm_cache"
    if config.strategy == SEMI_AUTOREGRESSIVE and not windows:
        raise ValueError(
            'In blocks the reference has `sliding_window=True` with `reference_sampler="ddpm_cache"` only.'
        )


def _refuse(config: DiffusionGenerationConfig, fields: tuple[str, ...], reason: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value:
            raise ValueError(f"`{field}`={value!r} has no effect here: {reason}. Leave it out.")
