"""The prompt and what is appended to it: the canvas of a generation."""

from typing import Any

import torch

from ..diffusion.canvas import check_length, check_tokens, real_positions
from .configuration import DiffusionGenerationConfig, as_list
from .strategies import SEMI_AUTOREGRESSIVE


def prepare_canvas(
    model: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, config: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and appended masks, long [batch * num_return_sequences, length], and where there is text, the same.

    Args:
        model: a `DiffusionGenerationMixin`.
        input_ids: [batch, length], the prompt; None for none, or for `config.bos_token_id` alone.
        attention_mask: [batch, length], 0 at padding.

    Raises:
        ValueError: for a prompt that is none, or that does not fit into the context with what is appended.
    """
    device, mask_token_id = model.device, model.config.mask_token_id
    if input_ids is None:
        beginning = [] if config.bos_token_id is None else [config.bos_token_id]
        input_ids = torch.tensor([beginning], dtype=torch.long)
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            "`inputs` must be an integer tensor [batch, length], got "
            f"{tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__}. Call the "
            'tokenizer with `return_tensors="pt"`.'
        )
    if not len(input_ids):
        raise ValueError(f"`inputs` is an empty batch, of shape {tuple(input_ids.shape)}. Pass at least one row.")
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"`attention_mask` must be a tensor [batch, length], got {type(attention_mask).__name__}. Call the "
            'tokenizer with `return_tensors="pt"`.'
        )
    input_ids = input_ids.to(device=device, dtype=torch.long)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        pad_token_id, others = config.pad_token_id, [*as_list(config.eos_token_id), mask_token_id]
        if pad_token_id is not None and pad_token_id not in others:
            attention_mask = (input_ids != pad_token_id).long()
    attention_mask = attention_mask.to(device)
    real = real_positions(input_ids, attention_mask)
    check_tokens(input_ids, real, model.config.vocab_size, mask_token_id)
    attention_mask = attention_mask.long()

    appended = _num_appended(input_ids, mask_token_id, config)
    input_ids = torch.nn.functional.pad(input_ids, (0, appended), value=mask_token_id)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, appended), value=1)
    if config.strategy != SEMI_AUTOREGRESSIVE or model.has_exact_cache:
        # Positions to fill are text too: prompt and `max_new_tokens` share the context.
        check_length(input_ids, attention_mask.bool(), model.config.max_position_embeddings)
    repeats = config.num_return_sequences
    return input_ids.repeat_interleave(repeats, dim=0), attention_mask.repeat_interleave(repeats, dim=0)


def _num_appended(input_ids: torch.Tensor, mask_token_id: int, config: DiffusionGenerationConfig) -> int:
    length = input_ids.shape[1]
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None and bool((input_ids == mask_token_id).any()):
        return 0
    max_length = config.max_length
    if max_length is None:
        max_length = DiffusionGenerationConfig._get_default_generation_params()["max_length"]
    if max_length < length:
        raise ValueError(
            f"`max_length` ({max_length}) is less than the length of `inputs` ({length}). Raise it, or set "
            "`max_new_tokens`."
        )
    return max_length - length
