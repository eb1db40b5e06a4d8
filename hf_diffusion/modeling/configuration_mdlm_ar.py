"""Configuration of the autoregressive baseline that MDLM is published with (arXiv 2406.07524)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_mdlm import PUBLISHED_NAMES, read_published_names, validate_heads, validate_token_ids


@strict
class MDLMARConfig(PreTrainedConfig):
    r"""
    See `MDLMConfig` for the arguments; there is no noise here, and so nothing about it.

    Args:
        mask_token_id (`int`, *optional*): an id that the vocabulary holds for the sake of MDLM, and that is never
            predicted; `vocab_size - 1` if not given.
    """

    model_type = "mdlm_ar"
    attribute_map = {published: ours for published, ours in PUBLISHED_NAMES.items() if published != "cond_dim"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    residual_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        read_published_names(self, kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where the numbers do not fit together (called by `@strict`)."""
        validate_heads(self)

    def validate_token_ids(self) -> None:
        """Raise ValueError for special tokens outside the vocabulary (called by `@strict`)."""
        validate_token_ids(self)


__all__ = ["MDLMARConfig"]
