"""The settings of one call of `generate`: what the call, its config, the model and the defaults say, in this order."""

import copy
from typing import Any

from transformers import GenerationConfig

from .configuration import DIFFUSION_FIELDS, TOKEN_FIELDS, DiffusionGenerationConfig, as_list, refuse_unknown
from .fields import WARPING_FIELDS, check_fields
from .strategies import SEMI_AUTOREGRESSIVE


LENGTHS = {"max_length", "max_new_tokens"}


def settings_of_call(
    model: Any,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    other_arguments: tuple[str, ...],
) -> tuple[DiffusionGenerationConfig, set[str]]:
    """
    Args:
        model: a `DiffusionGenerationMixin`.
        generation_config: of the call.
        kwargs: of the call, fields of the generation config.
        other_arguments: what `generate` takes besides; one of these may be meant by an unknown name.

    Returns:
        The settings, and the names of those that are not the model's nor the defaults.

    Raises:
        ValueError: for unknown names, fields without effect, and tokens that there are not.
    """
    refuse_unknown(kwargs, other_arguments)
    given = DiffusionGenerationConfig.from_generation_config(generation_config or DiffusionGenerationConfig())
    config = copy.deepcopy(given)
    settings = given.as_set()
    if kwargs.keys() & LENGTHS:
        settings = {name: value for name, value in settings.items() if name not in LENGTHS}
    settings.update(kwargs)
    _check_together(settings)
    in_call = set(settings)
    inherited = model.generation_config.to_dict()
    # What the call sets replaces what goes with the model's own setting of the same thing.
    if "strategy" in in_call:
        inherited = {name: value for name, value in inherited.items() if name not in DIFFUSION_FIELDS}
    if in_call & LENGTHS:
        inherited = {name: value for name, value in inherited.items() if name not in LENGTHS}
    if kwargs.keys() & LENGTHS:
        config.max_length = config.max_new_tokens = None
    defaults = DiffusionGenerationConfig._get_default_generation_params()
    del defaults["max_length"]  # depends on the prompt
    config.update(**inherited, defaults_only=True)
    config.update(**defaults, defaults_only=True)
    config.update(**{name: defaults.get(name) if value is None else value for name, value in kwargs.items()})
    set_default_strategies(model, config)
    check_fields(type(model).__name__, config)
    _check_tokens(model, config)
    if config.num_return_sequences < 1:
        raise ValueError(f"`num_return_sequences` must be at least 1, got {config.num_return_sequences}.")
    return config, in_call


def _check_together(settings: dict[str, Any]) -> None:
    """Raise ValueError for arguments of one call that cannot both have their effect."""
    if settings.get("max_length") is not None and settings.get("max_new_tokens") is not None:
        raise ValueError("`max_length` and `max_new_tokens` say the same thing in two ways: pass one of them.")
    if settings.get("do_sample") is False:
        for name in WARPING_FIELDS:
            if settings.get(name) is not None:
                raise ValueError(
                    f"`{name}`={settings[name]!r} has no effect with `do_sample=False`: the most likely token is taken."
                )


def set_default_strategies(model: Any, config: DiffusionGenerationConfig) -> None:
    """Fill in what the family takes where `config` names no strategy."""
    if config.strategy is None:
        config.strategy = model.default_strategy(config.max_denoising_steps, in_block=False)
    if config.strategy == SEMI_AUTOREGRESSIVE:
        if config.block_strategy is None:
            config.block_strategy = model.default_strategy(config.max_denoising_steps, in_block=True)
        if config.block_length is None:
            config.block_length = model.generation_block_size


def _check_tokens(model: Any, config: DiffusionGenerationConfig) -> None:
    vocab_size, mask_token_id = model.config.vocab_size, model.config.mask_token_id
    eos_token_ids = as_list(config.eos_token_id)
    for name in (name for name in TOKEN_FIELDS if name != "pad_token_id"):
        for token_id in as_list(getattr(config, name)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"`{name}` must lie in the vocabulary (0 to {vocab_size - 1}), got {token_id}.")
    for name in ("eos_token_id", "bos_token_id", "forced_eos_token_id"):
        if mask_token_id in as_list(getattr(config, name)):
            raise ValueError(_not_the_mask(name, mask_token_id))
    if eos_token_ids and config.pad_token_id == mask_token_id:
        raise ValueError(_not_the_mask("pad_token_id", mask_token_id))


def _not_the_mask(name: str, mask_token_id: int) -> str:
    return (
        f"`{name}` ({mask_token_id}) is the mask token, the sign for a position to fill, which is never drawn or left "
        "in a text. Name another one."
    )
