"""Configuration of a pretrained causal model that is read and written in parallel streams."""

from typing import Any, Literal

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from .configuration_checks import check_model_type, check_token_ids, checked


LaterText = Literal["wrap", "native", "hide"]


@checked
class CausalStreamsConfig(PreTrainedConfig):
    r"""
    Args:
        causal_lm_config (`PreTrainedConfig` or `dict`): of the causal model inside.
        later_text (`"wrap"`, `"native"` or `"hide"`): how a row reads text that is known to its right: as if it stood
            before the text (at the distance `q - k + C`, C being the length of the text), at its own, negative
            distance, or not at all.
        rotary_layers (`list[bool]`, *optional*): for each layer of the causal model, whether it has rotary positions.
            What `"wrap"` reads hangs on it, and `conversion.from_causal_lm` finds it out.
        mask_token_id (`int`, *optional*): the id that marks a position to fill, a sign between user and `generate`, in
            the vocabulary or not; `vocab_size` if not given, the first id outside.
        causal_lm_generation_config (`dict`, *optional*): what the causal model's own `generate` goes by.
        bos_token_id, eos_token_id, pad_token_id: those of the causal model if not given.
    """

    model_type = "causal_streams"
    sub_configs = {"causal_lm_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    causal_lm_config: dict | PreTrainedConfig | None = None
    later_text: LaterText = "wrap"
    rotary_layers: list[bool] | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    causal_lm_generation_config: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # the causal model ties its own

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.causal_lm_config is None:
            self.causal_lm_config = AutoConfig.for_model("llama")
        if isinstance(self.causal_lm_config, dict):
            self.causal_lm_config = AutoConfig.for_model(**self.causal_lm_config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.get_text_config(), name, None))
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size
        super().__post_init__(**kwargs)

    def validate_token_ids(self) -> None:
        """Raise ValueError for special tokens that the model could not generate (called by `@checked`)."""
        check_token_ids(self, ("bos_token_id", "eos_token_id"))
        if self.mask_token_id is not None and self.mask_token_id < 0:
            raise ValueError(f"`mask_token_id` must be at least 0, got {self.mask_token_id}. Leave it out.")

    def note_generation(self, generation_config: GenerationConfig | None) -> None:
        """Keep what the causal model's own `generate` goes by, for `base_model` when it is loaded again."""
        if generation_config is not None:
            settings = generation_config.to_diff_dict()
            self.causal_lm_generation_config = {
                name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"
            }

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The causal model's: what transformers looks up, or changes, for a language model inside another one."""
        return self.causal_lm_config.get_text_config(*args, **kwargs)  # type: ignore[union-attr]

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.get_text_config().vocab_size = size

    @property
    def hidden_size(self) -> int:
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.get_text_config().num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.get_text_config().max_position_embeddings


__all__ = ["CausalStreamsConfig", "LaterText"]
