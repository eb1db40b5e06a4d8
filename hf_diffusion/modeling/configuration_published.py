"""What the configurations of all models of the MDLM publication have in common (arXiv 2406.07524)."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_checks import check_activation, check_heads, check_model_type, check_sizes, check_token_ids, checked


@checked
class PublishedConfig(PreTrainedConfig):
    r"""
    The names that the published configurations use (`attribute_map`) are accepted in place of ours, and readable as
    attributes; ours are written.

    Args:
        vocab_size (`int`, defaults to 50258): number of tokens that the network reads, the mask token among them.
        hidden_size (`int`, defaults to 768): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the feed-forward layers; `4 * hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 12): number of layers.
        num_attention_heads (`int`, defaults to 12): number of attention heads.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`): activation of the feed-forward layers.
        max_position_embeddings (`int`, defaults to 1024): longest text in tokens.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        residual_dropout (`float`, defaults to 0.1): dropout on what each sublayer adds to the residual stream.
        attention_dropout (`float`, defaults to 0.0): dropout on attention probabilities.
        rope_parameters (`dict`, *optional*): rotary position embeddings, as in transformers.
        tie_word_embeddings (`bool`, defaults to `False`): share input and output embeddings. No published model does.
        mask_token_id (`int`, *optional*): id of the mask token, which is never predicted; `vocab_size - 1` if not
            given, as in all models whose tokenizer brings no mask token of its own.
    """

    attribute_map = {
        "hidden_dim": "hidden_size",
        "n_blocks": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "model_length": "max_position_embeddings",
        "dropout": "residual_dropout",
    }
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
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_published_names(kwargs)
        check_sizes(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def _read_published_names(self, kwargs: dict[str, Any]) -> None:
        """Take the values of published names out of `kwargs`, and drop what is stale in a published file.

        A published file asks for tuples in place of outputs by name, and for remote code that transformers 5 cannot
        run: neither is meant for the classes here, nor to be written again.
        """
        published = [name for name in self.attribute_map if name in kwargs]
        for name in published:
            ours, value = self.attribute_map[name], kwargs.pop(name)
            if getattr(self, ours) not in (getattr(type(self), ours), value):
                raise ValueError(
                    f"`{name}` ({value}) and `{ours}` ({getattr(self, ours)}) are the same thing: pass one of them."
                )
            setattr(self, ours, value)
        if published and not set(published) <= {"dropout"}:
            self.return_dict = True
            self.architectures = None
            for name in ("auto_map", "_name_or_path"):
                kwargs.pop(name, None)

    def validate_architecture(self) -> None:
        """Raise ValueError where settings do not fit together (called by `@checked`)."""
        check_sizes(self)
        check_heads(self)
        check_activation(self)

    def validate_token_ids(self) -> None:
        """Raise ValueError for special tokens outside the vocabulary (called by `@checked`).

        `pad_token_id` may lie outside: padding is not read.
        """
        check_token_ids(self, ("mask_token_id", "bos_token_id", "eos_token_id"))
