"""What a causal model makes of positions, masks and its cache, found by asking it: passes of one to three tokens.

Its configuration does not tell. Some models take `position_ids` and go by the order of their rows all the same, some
layers have no rotary positions while others have, and what is passed to a model may not reach its attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..modeling.cache_streams import CausalStreamsCache
from ..modeling.wrapped_attention import (
    WRAPPED,
    register_wrapped_attention,
    rotary_embedding,
    rotate,
    rotation_of,
    turn_by,
    wrapped_attention_forward,
)


PROBED = "causal_streams_probe"
"""Name of the attention that shows its queries."""

PLACE, TURN = 3, 5
"""A position, and by how many positions it is turned on: few, as any context has them, and angles are exact."""


@torch.no_grad()
def check_order_is_free(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError unless a text whose rows come in another order, with a cache, is still the same text."""
    name, device = type(causal_lm).__name__, _device(causal_lm)
    config = causal_lm.config.get_text_config()
    text = (torch.arange(1, 4, device=device) * config.vocab_size // 4)[None]
    order = torch.tensor([0, 2, 1], device=device)
    reads = (order[:, None] >= order)[None, None]
    with _probing(causal_lm, causal_lm.config._attn_implementation):
        expected = causal_lm(input_ids=text, use_cache=False).logits[:, order]
    answers, cache = [], CausalStreamsCache(config.num_hidden_layers)
    with _probing(causal_lm, WRAPPED), _refused_with(f"{name} cannot be run in the way that streams need"):
        for rows in (slice(0, 1), slice(1, 3)):
            outputs = causal_lm(
                inputs_embeds=causal_lm.get_input_embeddings()(text[:, order[rows]]),
                position_ids=order[None, rows],
                attention_mask=reads[:, :, rows, : rows.stop],
                past_key_values=cache,
                logits_to_keep=torch.arange(rows.stop - rows.start, device=device),
                use_cache=True,
                return_dict=True,
            )
            answers.append(outputs.logits)
    # Rounding adds up over the layers, and what goes wrong is seen in the first digits: half of them are enough.
    tolerance = float(expected.abs().max()) * _rounding(expected) ** 0.5
    if not torch.allclose(torch.cat(answers, dim=1), expected, rtol=0, atol=tolerance):
        raise ValueError(
            f"{name} reads a text otherwise when its rows come in another order, each with its position and with a "
            "mask of what it may read: it tells positions by the order of rows, or reads text on their right. Streams "
            "need a model that is causal and goes by `position_ids`."
        )


@torch.no_grad()
def find_rotary_layers(causal_lm: PreTrainedModel) -> list[bool]:
    """Which layers turn their queries by their position: one entry for each.

    On a text of one token there is nothing to weigh, and states do not depend on its position. So queries at two
    positions are equal in a layer without positions, and in one with rotary positions a rotation apart.

    Raises:
        ValueError: if some layer does neither, or if what is passed to the model does not reach its attention.
    """
    name, device = type(causal_lm).__name__, _device(causal_lm)
    remedy = 'Take `later_text="hide"` or "native".'
    if rotary_embedding(causal_lm) is None:
        raise ValueError(f'`later_text="wrap"` turns rotary positions, and {name} has none. {remedy}')
    parameters = getattr(causal_lm.config.get_text_config(), "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        raise ValueError(
            f'`later_text="wrap"`: the rotary frequencies of {name} change with the length of the text '
            f"(`rope_type`={parameters['rope_type']!r}), so that rotations do not compose. {remedy}"
        )
    with _refused_with(f'`later_text="wrap"`: {name} cannot be run in the way that it needs', remedy):
        embedding = causal_lm.get_input_embeddings().weight[:1]
        turn = turn_by(causal_lm, torch.tensor([[TURN]], device=device), like=embedding)
        before, after = (_queries(causal_lm, position, turn) for position in (PLACE, PLACE + TURN))
    found = []
    for layer in range(causal_lm.config.get_text_config().num_hidden_layers):
        if layer not in before:
            raise ValueError(
                f'`later_text="wrap"`: layers of {name} do not pass on to their attention what the model is given, so '
                f"that it is not told which text is on the right. {remedy}"
            )
        (module, query), (_, query_after) = before[layer], after[layer]
        is_rotary = not torch.equal(query, query_after)
        if is_rotary and not _is_turned(module, query, query_after, *turn):
            raise ValueError(
                f'`later_text="wrap"`: the rotary positions of {name} are applied in a way that is not known here. '
                f"{remedy}"
            )
        found.append(is_rotary)
    return found


def _queries(
    causal_lm: PreTrainedModel, position: int, turn: tuple[torch.Tensor, torch.Tensor]
) -> dict[int, tuple[nn.Module, torch.Tensor]]:
    """Attention and query [1, heads, 1, head_dim] of the layers of which they can be had, for a token at `position`."""
    found: dict[int, tuple[nn.Module, torch.Tensor]] = {}

    def show(module: nn.Module, query: torch.Tensor) -> None:
        found[module.layer_idx] = module, query  # type: ignore[index]

    # From the middle of the vocabulary: what stands for padding may have zeros for an embedding.
    token = torch.full((1, 1), causal_lm.config.get_text_config().vocab_size // 2, device=_device(causal_lm))
    reads = torch.ones_like(token[None, None], dtype=torch.bool)
    with _probing(causal_lm, PROBED):
        causal_lm(
            input_ids=token,
            position_ids=torch.full_like(token, position),
            attention_mask=reads,
            on_the_right=~reads,
            turn=turn,
            use_cache=False,
            show=show,
        )
    return found


def _is_turned(
    module: nn.Module, query: torch.Tensor, after: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether `after` is `query` turned on, up to what rounding does to each pair of channels."""
    if rotation_of(module) is None:
        return False
    one, zero = torch.ones_like(cos), torch.zeros_like(sin)
    length_of_pair = torch.hypot(rotate(module, query, one, zero), rotate(module, query, zero, one))
    error = (rotate(module, query, cos, sin) - after).abs()
    return bool((error <= 16 * _rounding(query) * length_of_pair).all())


def _showing_attention_forward(
    module: nn.Module, query: torch.Tensor, *args: Any, show: Callable | None = None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    if show is not None:
        show(module, query)
    return wrapped_attention_forward(module, query, *args, **kwargs)


@contextmanager
def _probing(causal_lm: PreTrainedModel, attention: str) -> Iterator[None]:
    """The model with another attention and without dropout; afterwards it is as it was."""
    register_wrapped_attention()
    AttentionInterface.register(PROBED, _showing_attention_forward)
    AttentionMaskInterface.register(PROBED, sdpa_mask)
    config = causal_lm.config
    parts = {name: getattr(config, name) for name in config.sub_configs}
    before = {name: part._attn_implementation for name, part in {"": config, **parts}.items() if part is not None}
    in_training = [module for module in causal_lm.modules() if module.training]
    causal_lm.eval()
    causal_lm.set_attn_implementation(attention)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)
        for module in in_training:
            module.training = True


@contextmanager
def _refused_with(reason: str, remedy: str = "") -> Iterator[None]:
    """What the model's code raises when it is asked for what it was not written for, as a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{reason} ({type(error).__name__}: {error}). {remedy}".rstrip()) from error


def _device(causal_lm: PreTrainedModel) -> torch.device:
    return causal_lm.get_input_embeddings().weight.device


def _rounding(states: torch.Tensor) -> float:
    """Rounding of one step; models compute angles and norms in float32 at best."""
    return max(torch.finfo(states.dtype).eps, torch.finfo(torch.float32).eps)


__all__ = ["check_order_is_free", "find_rotary_layers"]
