"""Any pretrained causal model as one that writes in parallel streams: nothing is trained, nothing is changed."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..generation.configuration import DiffusionGenerationConfig
from ..generation.fields import EFFECTIVE_FIELDS, WARPING_FIELDS
from ..modeling.configuration_streams import CausalStreamsConfig, LaterText
from ..modeling.modeling_streams import CausalStreamsForMaskedDiffusion
from ..modeling.wrapped_attention import WRAPPED, check_asked_for
from .causal_lm_probe import check_order_is_free, find_rotary_layers


def from_causal_lm(
    name_or_model: str | Path | PreTrainedModel,
    later_text: LaterText = "wrap",
    gap_token_id: int | None = None,
    mask_token_id: int | None = None,
    **kwargs: Any,
) -> CausalStreamsForMaskedDiffusion:
    """
    What the model makes of positions and masks is tried on texts of one to three tokens. From then on its attention
    runs as SDPA, whichever it was loaded with.

    Args:
        name_or_model: a causal model, or the folder or Hub name of one. A model is taken as it is, not copied.
        later_text: how text on the right is read (see `CausalStreamsConfig`). `"wrap"` needs rotary positions.
        gap_token_id: the token whose embedding the gap vector starts from; the start or end token if not given.
        mask_token_id: the sign for a position to fill, in the vocabulary or not; the first id outside if not given.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, for a name.

    Returns:
        A model that generates by the settings of the causal model's `generation_config`; draws are from the model's own
        law where that says nothing of sampling.

    Raises:
        ValueError: for models that cannot read text out of order, with the reason. They are left as they were.
    """
    if later_text not in get_args(LaterText):
        raise ValueError(f"`later_text` must be one of {list(get_args(LaterText))}, got {later_text!r}.")
    if mask_token_id is not None and mask_token_id < 0:
        raise ValueError(f"`mask_token_id` must be at least 0, got {mask_token_id}. Leave it out.")
    causal_lm = _causal_lm(name_or_model, kwargs)
    gap_token = start_token(causal_lm.config, gap_token_id)
    check_convertible(causal_lm)
    check_order_is_free(causal_lm)
    config = CausalStreamsConfig(
        causal_lm_config=causal_lm.config,
        later_text=later_text,
        rotary_layers=find_rotary_layers(causal_lm) if later_text == "wrap" else None,
        mask_token_id=mask_token_id,
    )
    with torch.device("meta"):
        model = CausalStreamsForMaskedDiffusion(config)
    causal_lm.set_attn_implementation(WRAPPED)
    model.causal_lm = causal_lm
    model.config.causal_lm_config = causal_lm.config
    embeddings = causal_lm.get_input_embeddings().weight
    model.gap = nn.Embedding.from_pretrained(embeddings.detach()[[gap_token]].clone(), freeze=False)
    model.generation_config = _generation_config(causal_lm.generation_config, config)
    return model.train(causal_lm.training)


def _causal_lm(name_or_model: str | Path | PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    if isinstance(name_or_model, str | Path):
        check_asked_for(kwargs.get("attn_implementation"))
        return AutoModelForCausalLM.from_pretrained(name_or_model, **kwargs)
    if not isinstance(name_or_model, PreTrainedModel):
        raise ValueError(
            f"`name_or_model` must be a name or a model of transformers, got {type(name_or_model).__name__}. Merge an "
            "adapter of PEFT into its model (`merge_and_unload`), or put one on what `from_causal_lm` returns."
        )
    if kwargs:
        raise ValueError(f"`{next(iter(kwargs))}` is for loading, and the model is loaded already. Leave it out.")
    return name_or_model


def _generation_config(own: GenerationConfig | None, config: CausalStreamsConfig) -> DiffusionGenerationConfig:
    """What the causal model generates by, as far as it means something for text in any order.

    Without `do_sample` the model takes the most likely tokens, and what narrows a distribution has no effect on it.
    """
    if own is None:
        return DiffusionGenerationConfig.from_model_config(config)
    names = EFFECTIVE_FIELDS if own.do_sample else EFFECTIVE_FIELDS.difference(WARPING_FIELDS)
    settings = {name: value for name, value in own.to_dict().items() if name in names and value is not None}
    return DiffusionGenerationConfig(**settings)


def check_convertible(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a model whose configuration shows that it cannot read text in another order."""
    config, name = causal_lm.config.get_text_config(), type(causal_lm).__name__
    if causal_lm.get_output_embeddings() is None:
        raise ValueError(f"{name} has no map to logits. Load it by `AutoModelForCausalLM`.")
    if causal_lm.get_input_embeddings().weight.is_meta:
        raise ValueError(f"The weights of {name} are not in memory. Load it without a meta device, and not offloaded.")
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
    if not (causal_lm._supports_sdpa and causal_lm._can_set_attn_implementation()):
        raise ValueError(
            f"The attention of {name} cannot run as SDPA through transformers' attention interface, which text in "
            "another order is read by."
        )


def start_token(config: PreTrainedConfig, token_id: int | None = None) -> int:
    """What stands for nothing before a text: `token_id`, or else the start or the end token of a model.

    Raises:
        ValueError: if that is no token of the vocabulary.
    """
    config = config.get_text_config()
    allowed = f"`gap_token_id` must be a token of the vocabulary (0 to {config.vocab_size - 1})"
    if token_id is not None:
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(f"{allowed}, got {token_id}.")
        return token_id
    eos = config.eos_token_id
    found = [config.bos_token_id, eos[0] if isinstance(eos, list) else eos]
    token = next((token for token in found if token is not None and 0 <= token < config.vocab_size), None)
    if token is None:
        raise ValueError(f"{allowed}: the model names no start or end token to take its place.")
    return token


__all__ = ["check_convertible", "from_causal_lm", "start_token"]
