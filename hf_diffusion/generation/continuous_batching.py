"""What transformers' continuous batching is asked for, checked before it begins.

Its loop runs in a thread of its own, where an error ends every text, and it passes over settings that it has no use
for.
"""

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..diffusion.canvas import check_context, check_no_mask, check_tokens
from .configuration import DIFFUSION_FIELDS


READ_FIELDS = {
    *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences"),
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "remove_invalid_values", "suppress_tokens"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "cache_implementation"),
    "continuous_batching_config",
}
"""Fields of a generation config that continuous batching acts on, or that change nothing in any batch."""


class CheckedBatchingManager(ContinuousBatchingManager):
    """transformers' manager, which takes no text that the model could not read to its end."""

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> str | None:
        """As in transformers; without `max_new_tokens` anywhere, a text may fill the context.

        Raises:
            ValueError: for tokens outside the vocabulary, an empty prompt and a text longer than the context.
        """
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        num_new = check_request(self.model.config, input_ids, max_new_tokens, self.num_return_sequences)
        return super().add_request(input_ids, request_id, num_new, *others, **kwargs)


def check_request(config: Any, input_ids: list[int], max_new_tokens: int | None, num_return_sequences: int) -> int:
    """Raise ValueError for a prompt that the model of `config` cannot continue; returns the most tokens to draw."""
    if len(input_ids) == 0:
        raise ValueError("`input_ids` of a request is empty. Pass a prompt of at least one token.")
    if len(input_ids) == 1 and num_return_sequences > 1:
        raise ValueError(
            f"`num_return_sequences`={num_return_sequences} with a prompt of one token: transformers copies a text "
            "when all but its last token is read, and then there is nothing to read. Pass the prompt that many times."
        )
    prompt = torch.as_tensor(input_ids)
    check_no_mask(prompt, config.mask_token_id)
    check_tokens(prompt, None, config.vocab_size, config.mask_token_id)
    room = config.max_position_embeddings - len(input_ids)
    num_new = max(room, 1) if max_new_tokens is None else max_new_tokens
    check_context(len(input_ids) + num_new, config.max_position_embeddings)
    return num_new


def check_batching_config(config: GenerationConfig) -> None:
    """Raise ValueError for the first field of `config` that continuous batching would pass over."""
    defaults = {**DIFFUSION_FIELDS, **GenerationConfig._get_default_generation_params()}
    for name, value in config.to_dict().items():
        if name.startswith("_") or name == "transformers_version" or name in READ_FIELDS:
            continue
        if value is not None and value is not False and value != defaults.get(name):
            raise ValueError(
                f"`{name}`={value!r} has no effect in continuous batching, which draws one token after another for "
                "every text alone. Leave it out, or pass a padded batch to `generate`."
            )
    batching_config = getattr(config, "continuous_batching_config", None)
    if batching_config is not None and not isinstance(batching_config, ContinuousBatchingConfig):
        raise ValueError(
            "`continuous_batching_config` must be a `ContinuousBatchingConfig` of transformers, got "
            f"{type(batching_config).__name__}."
        )


def check_as_kept(config: GenerationConfig, kept: GenerationConfig) -> None:
    """Raise ValueError for the first field in which `config` is not that of a manager that was kept.

    `max_new_tokens` goes with every request.
    """
    before = kept.to_dict()
    for name, value in config.to_dict().items():
        if name != "max_new_tokens" and value != before.get(name):
            raise ValueError(
                f"`{name}`={value!r} is {before.get(name)!r} in the manager that an earlier `persistent_manager`=True "
                "has kept. Call `destroy_cached_continuous_batching_manager` first."
            )


def as_paged_call(
    inputs: torch.Tensor | None, settings: dict[str, Any], others: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """`inputs` and `kwargs` of a call of `generate` that transformers turns into one of `generate_batch`.

    Args:
        settings: what the call and the generation configs say.
        others: positional arguments after `inputs` and the generation config.

    Raises:
        ValueError: for what would be passed over on this way, or would end in texts of several lengths.
    """
    # It was left aside, if there is one, and transformers would put the model's own back.
    kwargs = {**kwargs, "cache_implementation": "paged", "strategy": None}
    input_ids, attention_mask = kwargs.pop("input_ids", inputs), kwargs.pop("attention_mask", None)
    if attention_mask is not None and bool((attention_mask == 0).any()):
        raise ValueError(
            "`attention_mask` marks padding, which `cache_implementation`='paged' reads as text. Pass the prompts "
            "without it to `generate_batch`."
        )
    if any(argument for argument in (*others[:1], kwargs.pop("logits_processor", None))):
        raise ValueError("`logits_processor` has no effect with `cache_implementation`='paged'. Leave one of them out.")
    if settings.get("max_new_tokens") is None:
        raise ValueError(
            "`cache_implementation`='paged' counts the tokens to draw for every text. Set `max_new_tokens`."
        )
    num_texts = 1 if input_ids is None or input_ids.ndim == 1 else len(input_ids)
    may_end_early = num_texts > 1 and settings.get("eos_token_id") is not None
    if may_end_early or (settings.get("num_return_sequences") or 1) > 1:
        raise ValueError(
            "`cache_implementation`='paged' returns one text for a prompt, all of one length: no "
            "`num_return_sequences`, and no `eos_token_id` for several prompts. Pass them to `generate_batch`."
        )
    return input_ids, kwargs


__all__ = ["CheckedBatchingManager", "as_paged_call", "check_as_kept", "check_batching_config", "check_request"]
