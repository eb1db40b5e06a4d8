"""The generation config of masked-diffusion models: transformers' own, and what an order of generation needs."""

import difflib
import math
from typing import Any

from transformers import GenerationConfig


DIFFUSION_FIELDS: dict[str, Any] = {
    "strategy": None,
    "num_streams": None,
    "block_length": None,
    "block_strategy": None,
    "max_denoising_steps": None,
    "confidence_threshold": None,
    "entropy_bound": None,
    "learned_order": None,
    "remasking": None,
    "remasking_strength": None,
    "sliding_window": False,
    "approximate_cache": False,
    "reference_sampler": None,
}
TOKEN_FIELDS = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
CHOICES = {"remasking": ("cap", "rescale"), "reference_sampler": ("ddpm", "ddpm_cache", "analytic")}


class DiffusionGenerationConfig(GenerationConfig):
    r"""
    `GenerationConfig` plus the fields below. A name that neither knows is refused, here and in `generate`.

    Sampling is on by default, at temperature 1 and from the whole vocabulary: what `generate` then draws follows the
    model's own law. `do_sample=False` takes the most likely token at every position.

    Args:
        strategy (`str`, *optional*): which positions come next, one of

            - `"autoregressive"`: left to right, one per pass (default of ARMD);
            - `"strided"`: `num_streams` streams in parallel;
            - `"semi_autoregressive"`: blocks of `block_length` from left to right, each filled by `block_strategy`
              (default of block-causal MDLM, whose `block_size` is the length);
            - `"ancestral"`: masked diffusion in `max_denoising_steps` equal steps of time, exact in law (default of
              MDLM where those are given); steps that reveal nothing cost nothing;
            - `"first_hitting"`: masked diffusion in continuous time, one position per pass (default of MDLM);
            - `"confidence"`, `"margin"`, `"entropy"`: the positions first where the most likely token has the highest
              probability, leads by the most, or the entropy is lowest; one per pass, or all positions spread over
              `max_denoising_steps` passes.
            - `"velocity"`: for models that have learned an order (LoMDM), the position first that is revealed at the
              highest rate.
        num_streams (`int`, *optional*): with `"strided"`, number S of streams that are written in parallel.
        block_length (`int`, *optional*): with `"semi_autoregressive"`, number of positions in a block.
        block_strategy (`str`, *optional*): with `"semi_autoregressive"`, how a block is filled: `"spread"` (positions
            as far apart as possible; default of ARMD), `"ancestral"`, `"first_hitting"` (defaults of MDLM),
            `"confidence"`, `"margin"` or `"entropy"`.
        max_denoising_steps (`int`, *optional*): number of steps in which the canvas, or a block, is drawn.
        confidence_threshold (`float`, *optional*): with `"confidence"`, keep all positions whose most likely token has
            a higher probability than this together (Fast-dLLM, arXiv 2505.22618).
        entropy_bound (`float`, *optional*): with `"entropy"`, keep the positions of lowest entropy together whose
            entropies but for the highest one sum to at most this, in nats (EB-sampler, arXiv 2505.24857).
        learned_order (`bool`, *optional*): with `"ancestral"` and `"first_hitting"` on a model that has learned an
            order (LoMDM): False reveals positions in random order, as MDLM does. On by default, which makes of them
            the samplers with rates e(i)/t, and position by position in proportion to e(i).
        remasking (`"cap"` or `"rescale"`, *optional*): with `"ancestral"`, take drawn tokens back with the probability
            that ReMDM (arXiv 2503.00307) calls by that name.
        remasking_strength (`float`, *optional*): eta of `remasking`, in (0, 1].
        sliding_window (`bool`): with `"semi_autoregressive"`, draw as one block what fits into the context, and then
            blocks of `block_length`, as MDLM's authors do. Texts of a bidirectional model may exceed the context in
            blocks with and without it: a pass then reads the context that ends with its block.
        approximate_cache (`bool`): with `"semi_autoregressive"` on a bidirectional model, compute what was known when
            the block began once per block, not in every pass. An approximation, whose largest error is reported with
            `return_dict_in_generate=True` (`DiffusionGenerateOutput.cache_logit_error`).
        reference_sampler (`str`, *optional*): reproduce the tokens that the authors' implementation of MDLM draws from
            the same seed: `"ddpm"`, `"ddpm_cache"` or `"analytic"`, with `"ancestral"`; or `"ddpm_cache"` with
            `"semi_autoregressive"`, `sliding_window` and `block_strategy="ancestral"`. That law is not the model's
            (see `generation.reference_sampler`).
    """

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DIFFUSION_FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        refuse_unknown(kwargs)
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        defaults = GenerationConfig._get_default_generation_params()
        return {**defaults, "do_sample": True, "top_k": 0}

    @classmethod
    def from_model_config(cls, model_config: Any) -> "DiffusionGenerationConfig":
        """The special tokens of a model config; nothing else in it concerns generation."""
        names = ("eos_token_id", "pad_token_id")  # the models have a start symbol of their own
        # Without the mark of a derived config: a file that carries it is read without its settings.
        return cls(**{name: getattr(model_config, name, None) for name in names})

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """The same settings in this class. Raises ValueError if `config` carries a name that is not known."""
        return config if isinstance(config, cls) else cls.from_dict(config.to_dict())

    def as_set(self) -> dict[str, Any]:
        """Settings that are not None."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; `sequence_bias` as a list, since JSON has no tuples for keys."""
        settings = super().to_dict()
        if isinstance(settings.get("sequence_bias"), dict):
            settings["sequence_bias"] = [[list(tokens), bias] for tokens, bias in settings["sequence_bias"].items()]
        return settings

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        super().validate(strict=strict, user_set_attributes=user_set_attributes)
        for name in ("num_streams", "block_length", "max_denoising_steps", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name, most in (("confidence_threshold", 1), ("remasking_strength", 1), ("entropy_bound", math.inf)):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"`{name}` must be a number, got {value!r}.")
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"`{name}` must lie between 0 and {most}, got {value!r}.")
        if self.remasking_strength == 0:
            raise ValueError("`remasking_strength` is 0, which takes nothing back. Raise it, or leave `remasking` out.")
        for name in ("sliding_window", "approximate_cache", "learned_order"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")
        for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"`{name}` must be an integer, at least 0, got {value!r}.")
        for name in ("max_time", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        if self.guidance_scale is not None and not _is_number(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be a number, got {self.guidance_scale!r}.")
        decay = self.exponential_decay_length_penalty
        if decay is not None and not (
            isinstance(decay, list | tuple) and len(decay) == 2 and all(_is_number(value) for value in decay)
        ):
            raise ValueError(
                f"`exponential_decay_length_penalty` must be two numbers, a start and a factor, got {decay!r}."
            )
        for name in TOKEN_FIELDS:
            for token_id in as_list(getattr(self, name)):
                if not isinstance(token_id, int) or isinstance(token_id, bool):
                    raise ValueError(f"`{name}` must be an integer or a list of integers, got {getattr(self, name)!r}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def known_names() -> set[str]:
    """Every name that a `DiffusionGenerationConfig` accepts, those of its own housekeeping included."""
    private = ("_from_model_config", "_commit_hash", "_original_object_hash")
    return {*vars(GenerationConfig()), *DIFFUSION_FIELDS, *private, "transformers_version"}


def refuse_unknown(kwargs: dict[str, Any], other_arguments: tuple[str, ...] = ()) -> None:
    """Raise ValueError for the first name that no generation config has, with the nearest one that there is.

    Args:
        other_arguments: what `generate` takes besides.
    """
    known = known_names()
    for name in kwargs:
        if name not in known:
            nearest = difflib.get_close_matches(name, [*known, *other_arguments], n=1)
            hint = (
                f" Did you mean `{nearest[0]}`?" if nearest else " See `DiffusionGenerationConfig` for what there is."
            )
            raise ValueError(f"`{name}` is not an argument of generation (value {kwargs[name]!r}).{hint}")


def as_list(token_ids: int | list[int] | None) -> list[int]:
    """The ids of a setting that is one id, several, or none."""
    if token_ids is None:
        return []
    return list(token_ids) if isinstance(token_ids, list | tuple) else [token_ids]


__all__ = ["DiffusionGenerationConfig"]
