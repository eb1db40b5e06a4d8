"""Any pretrained causal model as one that writes in parallel streams: nothing is trained, nothing is changed."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling.configuration_streams import CausalStreamsConfig
from ..modeling.modeling_streams import CausalStreamsForMaskedDiffusion, rotary_embedding
from ..modeling.wrapped_attention import WRAPPED, rotate, rotation_of


def from_causal_lm(
    name_or_model: str | Path | PreTrainedModel,
    later_text: Literal["wrap", "native", "hide"] = "wrap",
    gap_token_id: int | None = None,
    mask_token_id: int | None = None,
    **kwargs: Any,
) -> CausalStreamsForMaskedDiffusion:
    """
    Args:
        name_or_model: a causal model, or the folder or Hub name of one. A model is taken as it is, not copied.
        later_text: how text on the right is read (see `CausalStreamsConfig`). `"wrap"` needs rotary positions.
        gap_token_id: the token whose embedding the gap vector starts from; the start or end token if not given.
        mask_token_id: the sign for a position to fill; the first id outside the vocabulary if not given.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, for a name.

    Raises:
        ValueError: for models that cannot read text out of order, with the reason.
    """
    if isinstance(name_or_model, PreTrainedModel):
        if kwargs:
            raise ValueError(f"`{next(iter(kwargs))}` is for loading, and the model is loaded already. Leave it out.")
        causal_lm = name_or_model
    else:
        causal_lm = AutoModelForCausalLM.from_pretrained(name_or_model, **kwargs)
    config = CausalStreamsConfig(causal_lm_config=causal_lm.config, later_text=later_text, mask_token_id=mask_token_id)
    check_convertible(causal_lm, later_text)
    with torch.device("meta"):
        model = CausalStreamsForMaskedDiffusion(config)
    causal_lm.set_attn_implementation(WRAPPED if later_text == "wrap" else "sdpa")
    model.causal_lm = causal_lm
    model.config.causal_lm_config = causal_lm.config
    embeddings = causal_lm.get_input_embeddings().weight
    gap = embeddings.detach()[[start_token(config, gap_token_id)]].clone()
    model.gap = nn.Embedding.from_pretrained(gap, freeze=False)
    model.generation_config = model.generation_config_class.from_model_config(config)
    return model.train(causal_lm.training)


def check_convertible(causal_lm: PreTrainedModel, later_text: str) -> None:
    """Raise ValueError for a model that reads its text in a way that depends on the order of its rows."""
    config, name = causal_lm.config.get_text_config(), type(causal_lm).__name__
    layer_types = set(getattr(config, "layer_types", None) or [])
    others = layer_types - {"full_attention", "sliding_attention"}
    if getattr(causal_lm, "_is_stateful", False) or others:
        found = f" ({', '.join(sorted(others))})" if others else ""
        raise ValueError(
            f"{name} has layers{found} other than attention over the whole text: recurrent or convolutional ones keep "
            "a state that goes from left to right. Only attention can read text in another order."
        )
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types or (window is not None and not layer_types)
    if slides and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{name} has sliding windows (`sliding_window`={window}): which tokens a row may read goes by how many "
            "rows ago they were read, and that is not where they stand in the text."
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise ValueError(f"{name} tells positions by ALiBi, which goes by the order of rows, not by their positions.")
    if later_text == "wrap":
        _check_rotary(causal_lm, name)


def _check_rotary(causal_lm: PreTrainedModel, name: str) -> None:
    rotary = rotary_embedding(causal_lm)
    remedy = 'Take `later_text="hide"` or "native".'
    if rotary is None:
        raise ValueError(f'`later_text="wrap"` turns rotary positions, and {name} has none. {remedy}')
    parameters = getattr(causal_lm.config.get_text_config(), "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        raise ValueError(
            f'`later_text="wrap"`: the rotary frequencies of {name} change with the length of the text '
            f"(`rope_type`={parameters['rope_type']!r}), so that rotations do not compose. {remedy}"
        )
    attention = next(
        (module for module in causal_lm.modules() if rotation_of(module) and hasattr(module, "q_proj")), None
    )
    if attention is None:
        attention = next((module for module in causal_lm.modules() if rotation_of(module)), None)
    if attention is None or not _rotations_compose(attention, rotary):
        raise ValueError(
            f'`later_text="wrap"`: the rotary positions of {name} are applied in a way that is not known here. {remedy}'
        )


@torch.no_grad()
def _rotations_compose(attention: nn.Module, rotary: Any) -> bool:
    """Whether turning by 3 positions and then by 5 is turning by 8, with the functions that the model uses."""
    like = torch.zeros(1, dtype=torch.float32, device=rotary.inv_freq.device)

    def angles(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary(like, torch.full((1, 1), position, device=like.device))
        return cos / getattr(rotary, "attention_scaling", 1.0), sin / getattr(rotary, "attention_scaling", 1.0)

    states = torch.randn(1, 1, 1, angles(1)[0].shape[-1], generator=torch.Generator().manual_seed(0)).to(like.device)
    twice = rotate(attention, rotate(attention, states, *angles(3)), *angles(5))
    return torch.allclose(twice, rotate(attention, states, *angles(8)), atol=1e-4)


def start_token(config: PreTrainedConfig, token_id: int | None = None) -> int:
    """What stands for nothing before a text: `token_id`, or else the start or the end token of a model.

    Raises:
        ValueError: if that is no token of the vocabulary.
    """
    eos = config.eos_token_id
    found = [token_id, config.bos_token_id, eos[0] if isinstance(eos, list) else eos]
    token = next((token for token in found if token is not None), None)
    if token is None or not 0 <= token < config.vocab_size:
        raise ValueError(
            f"`gap_token_id` must be a token of the vocabulary (0 to {config.vocab_size - 1}), got {token!r}. The "
            "model names no start or end token to take its place."
        )
    return token


__all__ = ["check_convertible", "from_causal_lm", "start_token"]
