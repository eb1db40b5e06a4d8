"""Configuration of ARMD, the auto-regressive masked diffusion model (arXiv 2601.16971)."""

from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_checks import check_activation, check_heads, check_model_type, check_sizes, check_token_ids, checked


@checked
class ARMDConfig(PreTrainedConfig):
    r"""
    Args:
        vocab_size (`int`, defaults to 50257): number of tokens that the network reads and predicts.
        hidden_size (`int`, defaults to 768): width of the residual streams.
        intermediate_size (`int`, *optional*): width of the feed-forward layers; `4 * hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 12): number of layers L.
        num_two_stream_layers (`int`, *optional*): how many of them, the first ones, carry a content and a query stream
            (L^2s in the paper); `num_hidden_layers // 2` if not given, as in the paper.
        num_attention_heads (`int`, defaults to 12): number of attention heads.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`): activation of the feed-forward layers.
        max_position_embeddings (`int`, defaults to 1024): longest text in tokens, the start symbol not counted.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights. Projections into the
            residual stream are scaled by `1 / sqrt(2 * num_hidden_layers)` on top.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        residual_dropout (`float`, defaults to 0.0): dropout on embeddings and on what each sublayer adds to its stream.
        attention_dropout (`float`, defaults to 0.0): dropout on attention probabilities.
        rope_parameters (`dict`, *optional*): rotary position embeddings, as in transformers.
        prefix_encoding (`"sinusoidal"` or `"learned"`): form of the position encoding PE in the prefix aggregation
            layer: fixed sinusoids followed by one learned linear map (the paper says "a fixed number of parameters,
            independent of sequence length"), or a learned table of `max_position_embeddings + 1` rows.
        prefix_encoding_size (`int`, defaults to 64): width d_pe of PE.
        prefix_scale (`float`, *optional*): factor of the aggregated prefix; `1 / prefix_encoding_size` if not given.
            The paper writes no factor; without one the sum swamps the residual stream that it seeds.
        left_neighbour (`bool`, defaults to `False`): add to each query the embedding of the token on its left where
            that token is known, and a learned vector where it is not. Not in the paper. It gives the query stream from
            the first step what an autoregressive model has by construction.
        tie_word_embeddings (`bool`, defaults to `True`): share input and output embeddings. The sizes that the paper
            states (125M, 345M) fit a tied model.
        mask_token_id (`int`, *optional*): the id that marks a position to fill. It is a sign between user and
            `generate`, never read by the network; `vocab_size` if not given, the first id outside the vocabulary.
    """

    model_type = "armd"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_two_stream_layers: int | None = None
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    residual_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None
    prefix_encoding: Literal["sinusoidal", "learned"] = "sinusoidal"
    prefix_encoding_size: int = 64
    prefix_scale: float | int | None = None
    left_neighbour: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_two_stream_layers is None:
            self.num_two_stream_layers = max(1, self.num_hidden_layers // 2)
        if self.prefix_scale is None and self.prefix_encoding_size:
            self.prefix_scale = 1.0 / self.prefix_encoding_size
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where the numbers do not fit together (called by `@checked`)."""
        check_sizes(self)
        check_heads(self)
        check_activation(self)
        if self.num_two_stream_layers is not None and not 1 <= self.num_two_stream_layers <= self.num_hidden_layers:
            raise ValueError(
                f"`num_two_stream_layers` must be between 1 and `num_hidden_layers` ({self.num_hidden_layers}), got "
                f"{self.num_two_stream_layers}: the query stream reads the text through these layers only."
            )
        if self.prefix_encoding_size < 2 or self.prefix_encoding_size % 2:
            raise ValueError(f"`prefix_encoding_size` must be even and positive, got {self.prefix_encoding_size}.")

    def validate_token_ids(self) -> None:
        """Raise ValueError for special tokens that the model could not generate (called by `@checked`).

        `mask_token_id` and `pad_token_id` may lie outside the vocabulary: the network reads neither.
        """
        check_token_ids(self, ("bos_token_id", "eos_token_id"))


__all__ = ["ARMDConfig"]
