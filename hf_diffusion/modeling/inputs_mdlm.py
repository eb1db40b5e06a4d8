"""What MDLM may be given to read: checks of a text, and the noise level from whichever argument names it."""

import math
from typing import Any

import torch

from ..diffusion.canvas import check_length, check_query_positions, check_tokens, real_positions
from ..diffusion.masking import NoisedText
from .batched_cache import SlotCache


def read_noise_level(
    config: Any,
    sigma: torch.Tensor | float | None,
    t: torch.Tensor | float | None,
    device: torch.device,
    batch_size: int | None = None,
) -> torch.Tensor:
    """What the network is told: sigma [batch] or [1] in nats, from the one of the two that is given.

    Args:
        sigma, t: as in `MDLMForMaskedDiffusion.forward`.
        batch_size: number of rows that there are noise levels for, if it is known.

    Raises:
        ValueError: if the model is not told the noise level, or needs one and gets none, both or an impossible one.
    """
    given = {name: value for name, value in (("sigma", sigma), ("t", t)) if value is not None}
    if not config.time_conditioning:
        for name, value in given.items():
            raise ValueError(
                f"`{name}`={value} has no effect: this model is not told the noise level "
                "(`config.time_conditioning` is False). Leave it out."
            )
        return torch.zeros(1, device=device)
    if len(given) != 1:
        raise ValueError(
            f"A model with `time_conditioning` needs either `sigma` (the noise level -log alpha, in nats) or `t` "
            f"(the time between 0 and 1, which `config.noise_schedule` makes a noise level of); got "
            f"{'both' if given else 'neither'}."
        )
    ((name, value),) = given.items()
    level = torch.as_tensor(value, device=device, dtype=torch.get_default_dtype()).reshape(-1)
    if batch_size is not None and level.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`{name}` must be one number or one for each of the {batch_size} rows of `input_ids`, got shape "
            f"{tuple(torch.as_tensor(value).shape)}."
        )
    if not torch.compiler.is_compiling():
        most = 1.0 if name == "t" else math.inf
        if not bool(((level >= 0) & (level <= most) & level.isfinite()).all()):
            remedy = (
                "a time runs from 0 to 1" if name == "t" else "a noise level is -log alpha, finite and not negative"
            )
            raise ValueError(f"`{name}` must be a valid {name}, got {level.tolist()}: {remedy}.")
    return config.make_schedule().sigma(level) if name == "t" else level


def read_text(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, query_positions: torch.Tensor | None, config: Any
) -> torch.Tensor | None:
    """Check a text. Values are not looked at while compiling.

    Returns:
        Bool [batch, length], False at padding; None if there is none, or if a 4-D `attention_mask` says who reads whom.

    Raises:
        ValueError: for a text that the network cannot read.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` must be an integer tensor [batch, length], got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    padding = attention_mask
    if attention_mask is not None and attention_mask.ndim == 4:
        if config.block_size is not None:
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} does not go with `block_size` "
                f"({config.block_size}), which says who reads whom. Pass [batch, length], 0 at padding."
            )
        padding = None
    if torch.compiler.is_compiling() or input_ids.numel() == 0:
        return padding.bool() if padding is not None else None
    real = real_positions(input_ids, padding)
    check_length(input_ids, real, config.max_position_embeddings)
    check_tokens(input_ids, real, config.vocab_size, config.mask_token_id)
    if query_positions is not None:
        check_query_positions(query_positions, *input_ids.shape)
    return real


def check_noised(
    noised: Any, text: torch.Tensor, attention_mask: torch.Tensor | None, mask_token_id: int
) -> NoisedText:
    """A noised text as it is passed to `forward`. Raises ValueError unless it is made of `text` [batch, length]."""
    if not isinstance(noised, tuple | list) or len(noised) != len(NoisedText._fields):
        raise ValueError(
            f"`noised` must hold {', '.join(NoisedText._fields)}, got {type(noised).__name__} of {len(noised)}."
        )
    noised = NoisedText(*noised)
    if noised.input_ids.shape != text.shape:
        raise ValueError(
            f"`noised.input_ids` must have the shape of `input_ids` {tuple(text.shape)}, got "
            f"{tuple(noised.input_ids.shape)}."
        )
    for name, values in (("weight", noised.weight), ("sigma", noised.sigma)):
        if values.ndim != 2 or values.shape[0] != len(text) or values.shape[1] not in (1, text.shape[1]):
            raise ValueError(
                f"`noised.{name}` must have shape {tuple(text.shape)} or {(len(text), 1)}, got {tuple(values.shape)}."
            )
    if torch.compiler.is_compiling():
        return noised
    other = (noised.input_ids != mask_token_id) & (noised.input_ids != text)
    if attention_mask is not None and attention_mask.ndim == 2:
        other &= attention_mask != 0
    if bool(other.any()):
        raise ValueError(
            f"`noised.input_ids` holds {int(noised.input_ids[other][0])} where the text holds {int(text[other][0])}: "
            "its visible tokens must be those of the text."
        )
    return noised


def check_cache(
    cache: Any,
    kind: type[SlotCache],
    query_positions: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    num_layers: int,
) -> None:
    """Raise ValueError for a cache that the model or the batch cannot use."""
    if not isinstance(cache, kind):
        raise ValueError(
            f"`past_key_values` must be an `{kind.__name__}`, got {type(cache).__name__}. Models with `block_size` "
            "have an exact `MDLMCache`; in others every position reads all others, so nothing stays right when a token "
            "is drawn, and there is only an `ApproximateMDLMCache`."
        )
    if len(cache.layers) != num_layers:
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers, and the model {num_layers}. Make it with "
            f"`{kind.__name__}({num_layers})`."
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} does not go with `past_key_values`, which reads "
            "some rows only. Pass [batch, length], 0 at padding."
        )
    if query_positions is None:
        raise ValueError(
            "`past_key_values` needs `query_positions`: what they ask for is not finished, and says what is computed."
        )
    rows = cache.num_rows
    if rows is not None and rows != batch_size:
        raise ValueError(
            f"`input_ids` has {batch_size} rows, but the cache in `past_key_values` {rows}. Select or repeat the rows "
            "of the cache with those of the batch."
        )
