"""The generation config of masked-diffusion models: transformers' own, and what an order of generation needs."""

import difflib
from typing import Any

from transformers import GenerationConfig


DIFFUSION_FIELDS: dict[str, Any] = {
    "strategy": None,
    "num_streams": None,
    "block_length": None,
    "max_denoising_steps": None,
}


class DiffusionGenerationConfig(GenerationConfig):
    r"""
    `GenerationConfig` plus the fields below. A name that neither knows is refused, here and in `generate`.

    Sampling is on by default, at temperature 1 and from the whole vocabulary: what `generate` then draws follows the
    model's own law. `do_sample=False` takes the most likely token at every position.

    Args:
        strategy (`str`, *optional*): which positions come next: `"autoregressive"` (default), `"strided"`,
            `"semi_autoregressive"`.
        num_streams (`int`, *optional*): with `strategy="strided"`, number S of streams that are written in parallel.
        block_length (`int`, *optional*): with `strategy="semi_autoregressive"`, number of positions in a block.
        max_denoising_steps (`int`, *optional*): with `strategy="semi_autoregressive"`, number of steps in which a block
            is drawn; `block_length` (one position per step) if not given.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DIFFUSION_FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        refuse_unknown(kwargs)
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        defaults = GenerationConfig._get_default_generation_params()
        return {**defaults, "do_sample": True, "top_k": 0, "strategy": "autoregressive"}

    @classmethod
    def from_model_config(cls, model_config: Any) -> "DiffusionGenerationConfig":
        """The special tokens of a model config; nothing else in it concerns generation."""
        names = ("eos_token_id", "pad_token_id")  # the models have a start symbol of their own
        return cls(**{name: getattr(model_config, name, None) for name in names}, _from_model_config=True)

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """The same settings in this class. Raises ValueError if `config` carries a name that is not known."""
        return config if isinstance(config, cls) else cls.from_dict(config.to_dict())

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        super().validate(strict=strict, user_set_attributes=user_set_attributes)
        for name in ("num_streams", "block_length", "max_denoising_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def known_names() -> set[str]:
    """Every name that a `DiffusionGenerationConfig` accepts, those of its own housekeeping included."""
    private = ("_from_model_config", "_commit_hash", "_original_object_hash")
    return {*vars(GenerationConfig()), *DIFFUSION_FIELDS, *private, "transformers_version"}


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for the first name that no generation config has, with the nearest one that it has."""
    known = known_names()
    for name in kwargs:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = (
                f" Did you mean `{nearest[0]}`?" if nearest else " See `DiffusionGenerationConfig` for what there is."
            )
            raise ValueError(f"`{name}` is not an argument of generation (value {kwargs[name]!r}).{hint}")


SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_together(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of one call that cannot both have their effect."""
    if kwargs.get("max_length") is not None and kwargs.get("max_new_tokens") is not None:
        raise ValueError("`max_length` and `max_new_tokens` say the same thing in two ways: pass one of them.")
    if kwargs.get("do_sample") is False:
        for name in SAMPLING_FIELDS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}`={kwargs[name]!r} has no effect with `do_sample=False`: the most likely token is taken."
                )


__all__ = ["DiffusionGenerationConfig"]
