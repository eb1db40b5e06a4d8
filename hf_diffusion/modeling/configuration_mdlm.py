"""Configuration of MDLM, the masked diffusion language model (arXiv 2406.07524)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..diffusion.masking import TimeSampling
from ..diffusion.schedules import NoiseSchedule, describe_schedule, make_schedule


PUBLISHED_NAMES = {
    "hidden_dim": "hidden_size",
    "cond_dim": "conditioning_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_position_embeddings",
    "dropout": "residual_dropout",
}
"""Names in the published configurations, and ours. Both are read; ours are written."""


@strict
class MDLMConfig(PreTrainedConfig):
    r"""
    The names that the published configurations use (`hidden_dim`, `cond_dim`, `n_blocks`, `n_heads`, `model_length`,
    `dropout`) are accepted in place of ours, and readable as attributes.

    Args:
        vocab_size (`int`, defaults to 50258): number of tokens that the network reads, the mask token among them.
        hidden_size (`int`, defaults to 768): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the feed-forward layers; `4 * hidden_size` if not given.
        conditioning_size (`int`, defaults to 128): width of the embedding of the noise level.
        num_hidden_layers (`int`, defaults to 12): number of layers.
        num_attention_heads (`int`, defaults to 12): number of attention heads.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`): activation of the feed-forward layers.
        max_position_embeddings (`int`, defaults to 1024): longest text in tokens.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        residual_dropout (`float`, defaults to 0.1): dropout on what each sublayer adds to the residual stream.
        attention_dropout (`float`, defaults to 0.0): dropout on attention probabilities.
        rope_parameters (`dict`, *optional*): rotary position embeddings, as in transformers.
        time_conditioning (`bool`, defaults to `False`): the network reads the noise level `sigma`. If not, it is told 0
            always, and what its layers make of that is a constant.
        attend_to_padding (`bool`, defaults to `False`): treat padding as the reference implementation does, which takes
            no attention mask: padding is attended to, counts as positions, and is noised like text, though not counted
            in the loss. If `False`, what `attention_mask` hides has no effect on any other position.
        noise_schedule (`str` or `dict`, defaults to `"loglinear"`): `type` and parameters of the noise schedule that
            `labels` and `t` are understood by (see `diffusion.schedules`).
        time_law (`"uniform"` or `"importance"`), least_time (`float`, defaults to 1e-3), low_discrepancy (`bool`,
            defaults to `True`), num_timesteps (`int`, *optional*): how training times are drawn (see
            `diffusion.masking.TimeSampling`). The defaults are those of the published models.
        tie_word_embeddings (`bool`, defaults to `False`): share input and output embeddings. No published model does.
        mask_token_id (`int`, *optional*): id of the mask token; `vocab_size - 1` if not given, as in all models whose
            tokenizer brings no mask token of its own.
    """

    model_type = "mdlm"
    attribute_map = PUBLISHED_NAMES

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int | None = None
    conditioning_size: int = 128
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    residual_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None
    time_conditioning: bool = False
    attend_to_padding: bool = False
    noise_schedule: str | dict = "loglinear"
    time_law: Literal["uniform", "importance"] = "uniform"
    least_time: float | int = 1e-3
    low_discrepancy: bool = True
    num_timesteps: int | None = None
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
        self.noise_schedule = describe_schedule(make_schedule(self.noise_schedule))
        super().__post_init__(**kwargs)

    def make_schedule(self) -> NoiseSchedule:
        return make_schedule(self.noise_schedule)

    def make_time_sampling(self) -> TimeSampling:
        return TimeSampling(self.time_law, self.least_time, self.num_timesteps, self.low_discrepancy)

    def validate_architecture(self) -> None:
        """Raise ValueError where the numbers do not fit together (called by `@strict`)."""
        validate_heads(self)

    def validate_noise(self) -> None:
        """Raise ValueError for a noise schedule or a law of times that is none, or not for this model (`@strict`)."""
        self.make_schedule()
        self.make_time_sampling()
        if self.time_conditioning and describe_schedule(self.make_schedule()).get("epsilon") == 0:
            raise ValueError(
                f"`noise_schedule` {self.noise_schedule} has an infinite noise level at t = 1, which the network would "
                "have to read because of `time_conditioning`. Give it a positive `epsilon`."
            )

    def validate_token_ids(self) -> None:
        """Raise ValueError for special tokens outside the vocabulary (called by `@strict`).

        `pad_token_id` may lie outside: padding is not read.
        """
        validate_token_ids(self)


def read_published_names(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Move the values of published names from `kwargs` into `config`, and drop what is stale in a published file.

    A published file asks for tuples in place of outputs by name, and for remote code that transformers 5 cannot run:
    neither is meant for the classes here, nor to be written again.
    """
    published = [name for name in config.attribute_map if name in kwargs]
    for name in published:
        setattr(config, config.attribute_map[name], kwargs.pop(name))
    if published and not set(published) <= {"dropout"}:
        config.return_dict = True
        config.architectures = None
        for name in ("auto_map", "_name_or_path"):
            kwargs.pop(name, None)


def validate_heads(config: Any) -> None:
    """Raise ValueError unless the heads divide the width into even parts."""
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be an even multiple of `num_attention_heads` "
            f"({config.num_attention_heads}): rotary embeddings turn pairs of channels of a head."
        )


def validate_token_ids(config: Any) -> None:
    """Raise ValueError for a mask, start or end token outside the vocabulary."""
    eos_token_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    named = [("mask_token_id", config.mask_token_id), ("bos_token_id", config.bos_token_id)]
    for name, token_id in [*named, *(("eos_token_id", id_) for id_ in eos_token_ids)]:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(f"`{name}` must lie in the vocabulary (0 to {config.vocab_size - 1}), got {token_id}.")


__all__ = ["MDLMConfig"]
