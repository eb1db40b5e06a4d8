"""The network of the MDLM repository, read off its weights: the configuration, and the shapes that follow from it.

What shapes do not tell comes from the hyper-parameters in the file, or has to be said.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..modeling.configuration_mdlm_ar import MDLMARConfig
from ..modeling.configuration_published import PublishedConfig
from ..modeling.layers_mdlm import NUM_SINUSOIDS
from .checkpoint_reader import CheckpointError, Shell
from .lightning_file import LightningFile, few
from .mdlm_siblings import ALGORITHMS, parameterization, setting


PREFIX = "backbone."
ROTARY_BUFFER = "rotary_emb.inv_freq"


def accept_settings(config_class: type[PublishedConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names. Raises ValueError for a name that there is not."""
    settings = {config_class.attribute_map.get(name, name): value for name, value in settings.items()}
    accepted = [*_fields(config_class), "parameterization"]
    for name, value in settings.items():
        if name not in accepted:
            nearest = difflib.get_close_matches(name, accepted, n=1)
            what = config_class.__name__.removesuffix("Config")
            hint = f"Did you mean `{nearest[0]}`?" if nearest else f"See `{what}Config` for what there is."
            raise ValueError(f"`{name}` is not a setting of {what} (value {value!r}). {hint}")
    return settings


def _fields(config_class: type[PublishedConfig]) -> list[str]:
    """The settings of a model, without those that all models in transformers have."""
    classes = [cls for cls in reversed(config_class.__mro__) if issubclass(cls, PublishedConfig)]
    return [name for cls in classes for name in cls.__annotations__ if name != "model_type"]


def network_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `weights` hold under `PREFIX`, without it. Raises CheckpointError if that is no network of MDLM's."""
    network = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    if not network:
        raise CheckpointError(
            f"its `state_dict` holds {few(weights) or 'nothing'}, where the names of an MDLM checkpoint begin with "
            f"{PREFIX!r}. It is a checkpoint of something else."
        )
    for name in ("vocab_embed.embedding", "blocks.0.mlp.0.weight"):
        if name not in network or network[name].ndim != 2:
            raise CheckpointError(f"`{PREFIX}{name}` is missing or no matrix. It is a checkpoint of something else.")
    return network


def conditioning_size(network: Mapping[str, torch.Tensor]) -> int | None:
    """The width of the embedding of the noise level; None if there is none, as in the autoregressive baseline."""
    bias = network.get("sigma_map.mlp.0.bias")
    if bias is None and any(name.startswith("sigma_map.") for name in network):
        raise CheckpointError(f"it lacks `{PREFIX}sigma_map.mlp.0.bias`, so it is not of MDLM's network.")
    return None if bias is None else bias.numel()


def read_architecture(network: Mapping[str, torch.Tensor], file: LightningFile) -> dict[str, Any]:
    """Fields of the configuration, None where the file does not say."""
    vocab_size, hidden_size = network["vocab_embed.embedding"].shape
    layers = {
        int(name.split(".")[1]) for name in network if name.startswith("blocks.") and name.split(".")[1].isdigit()
    }
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": network["blocks.0.mlp.0.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": setting(file.settings, "model", "n_heads"),
        "max_position_embeddings": setting(file.settings, "model", "length"),
        "mask_token_id": _mask_token_id(file.tokenizer, vocab_size),
    }
    for ours, theirs in {"hidden_size": "hidden_size", "num_hidden_layers": "n_blocks"}.items():
        said = setting(file.settings, "model", theirs)
        if said is not None and said != found[ours]:
            raise CheckpointError(f"its hyper-parameters say `{theirs}` {said}, but its weights {found[ours]}.")
    inverse_frequencies = network.get(ROTARY_BUFFER)
    if inverse_frequencies is not None:
        count = inverse_frequencies.numel()
        if count == 0 or hidden_size % (2 * count):
            raise CheckpointError(
                f"its {count} rotary frequencies (`{PREFIX}{ROTARY_BUFFER}`) do not fit a width of {hidden_size}: "
                "a head has one for every two of its channels."
            )
        found["num_attention_heads"] = hidden_size // (2 * count)
    dropout = setting(file.settings, "model", "dropout")
    if dropout is not None:
        found["residual_dropout"] = dropout
    if conditioning_size(network) is not None:
        found["conditioning_size"] = conditioning_size(network)
        found["time_conditioning"] = first_said(
            setting(file.settings, "algo", "time_conditioning"), setting(file.settings, "time_conditioning")
        )
    return found


def read_least_time(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The least time of training as a field of the configuration, if the file says so."""
    least_time = setting(settings, "training", "sampling_eps")
    return {"least_time": least_time} if isinstance(least_time, float) else {}


def make_config(
    config_class: type[PublishedConfig], found: Mapping[str, Any], given: Mapping[str, Any], settings: Mapping[str, Any]
) -> Any:
    """The configuration of what was `found` and what is `given`, which counts before it.

    Raises:
        CheckpointError: if something that was looked for is in neither, or if they do not make a configuration.
    """
    given = dict(given)
    is_causal = config_class is MDLMARConfig
    meaning = given.pop("parameterization", None) or parameterization(settings) or ("ar" if is_causal else None)
    known = {name: value for name, value in found.items() if value is not None} | given
    needed = {name: "" for name in found if name not in known}
    if meaning is None:
        needed["parameterization"] = " ('subs' for MDLM)"
    if needed:
        raise CheckpointError(
            "it does not say " + ", ".join(f"`{name}`{hint}" for name, hint in needed.items()) + ". Pass "
            f"{'it' if len(needed) == 1 else 'them'} by name."
        )
    if meaning != ("ar" if is_causal else "subs"):
        what = ALGORITHMS.get(str(meaning), f"of the parametrisation {meaning!r}, which is not supported")
        raise CheckpointError(f"it is {what}.")
    for name in known if is_causal else ():
        if name not in _fields(config_class):
            raise CheckpointError(f"it is of the autoregressive baseline, which has no `{name}`. Leave it out.")
    try:
        return config_class(**known)
    except ValueError as error:
        raise CheckpointError(f"its settings do not make a configuration: {error}") from None


def published_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the published network; without conditioning, of its causal baseline."""
    width, hidden, vocab_size = config.hidden_size, config.intermediate_size, config.vocab_size
    conditioning = None if isinstance(config, MDLMARConfig) else config.conditioning_size
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, width)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        shapes |= {f"{block}.attn_qkv.weight": (3 * width, width), f"{block}.attn_out.weight": (width, width)}
        linear(f"{block}.mlp.0", hidden, width)
        linear(f"{block}.mlp.2", width, hidden)
        if conditioning is not None:
            linear(f"{block}.adaLN_modulation", 6 * width, conditioning)
    shapes["output_layer.norm_final.weight"] = (width,)
    linear("output_layer.linear", vocab_size, width)
    if conditioning is not None:
        linear("output_layer.adaLN_modulation", 2 * width, conditioning)
        linear("sigma_map.mlp.0", conditioning, NUM_SINUSOIDS)
        linear("sigma_map.mlp.2", conditioning, conditioning)
    return shapes


def check_shapes(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless all of `shapes` are among `weights`."""
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise CheckpointError(f"it lacks {few(missing)}, so it is not of MDLM's network.")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"`{PREFIX}{name}` has the shape {tuple(weights[name].shape)}, where {shape} fits the other weights."
            )


def check_rotary(inverse_frequencies: torch.Tensor, config: Any) -> None:
    """Raise CheckpointError unless the positions turn as MDLM's do, with base 10000 over the width of a head."""
    head_dim = config.hidden_size // config.num_attention_heads
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    comparable = inverse_frequencies.is_floating_point() and inverse_frequencies.shape == expected.shape
    if not comparable or not torch.allclose(inverse_frequencies.double(), expected, rtol=1e-4):
        raise CheckpointError(
            f"its rotary frequencies ({inverse_frequencies.tolist()!s:.60}) are not those of "
            f"{config.num_attention_heads} heads in a width of {config.hidden_size}."
        )


def _mask_token_id(tokenizer: Any, vocab_size: int) -> int | None:
    """The id of the mask token, from what a pickled tokenizer says of itself; None if it does not say.

    A tokenizer that has a mask token lends it to the model. For one that has none, the model's vocabulary has one more.
    """
    state = tokenizer.state if isinstance(tokenizer, Shell) and isinstance(tokenizer.state, dict) else {}
    backend = state.get("_tokenizer")
    try:
        described = json.loads(backend.state) if isinstance(backend, Shell) else {}
    except (TypeError, ValueError):
        described = {}
    ids: dict[str, int] = {}
    vocabulary = described.get("model", {}).get("vocab", state.get("_vocab_str_to_int"))
    if isinstance(vocabulary, dict):
        ids |= vocabulary
    size = state.get("vocab_size", len(ids) or None)
    ids |= {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    special = state.get("_special_tokens_map")
    mask_token = state.get("_mask_token", special.get("mask_token") if isinstance(special, dict) else None)
    if isinstance(mask_token, Shell):
        mask_token = mask_token.state.get("content") if isinstance(mask_token.state, dict) else None
    if mask_token is not None:
        return ids.get(mask_token)
    return size if size == vocab_size - 1 else None


def first_said(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)
