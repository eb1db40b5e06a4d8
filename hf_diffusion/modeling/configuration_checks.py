"""What the configurations of all families check, and how they say what is wrong."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers.activations import ACT2FN


Config = TypeVar("Config")


def checked(cls: type[Config]) -> type[Config]:
    """`@strict` of huggingface_hub, with ValueErrors in place of exceptions of its own, which are none."""
    cls = strict(cls)
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, _with_value_errors(getattr(cls, name)))
    return cls


def _with_value_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None
        except StrictDataclassError as error:
            raise ValueError(str(error)) from None

    return wrapped


def check_sizes(config: Any) -> None:
    """Raise ValueError for a size that is none."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")


def check_heads(config: Any) -> None:
    """Raise ValueError unless the heads divide the width into even parts."""
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be an even multiple of `num_attention_heads` "
            f"({config.num_attention_heads}): rotary embeddings turn pairs of channels of a head."
        )


def check_activation(config: Any) -> None:
    """Raise ValueError for an activation that transformers does not know."""
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}.")


def check_token_ids(config: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError for special tokens outside the vocabulary.

    Args:
        names: of the fields that hold them, one id or a list of ids each, or None.
    """
    for name in names:
        value = getattr(config, name)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not 0 <= token_id < config.vocab_size:
                raise ValueError(f"`{name}` must lie in the vocabulary (0 to {config.vocab_size - 1}), got {token_id}.")


def check_model_type(cls: type, config_dict: dict[str, Any]) -> None:
    """Raise ValueError for the configuration of another kind of model, whose weights would mean something else."""
    own, found = cls.model_type, config_dict.get("model_type")  # type: ignore[attr-defined]
    if found not in (None, own):
        raise ValueError(
            f"`model_type` is {found!r}, not {own!r}: this folder holds another kind of model, and {cls.__name__} "
            "would make something else of it. Load it with the Auto classes."
        )
