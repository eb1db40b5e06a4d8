"""Checkpoints of the MDLM reference implementation: Lightning files with raw and with averaged weights.

The network is read off the shapes; what shapes do not tell comes from the hyper-parameters in the file, or has to be
said. Nothing in the file is run, and nothing is written before everything fits.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..modeling.configuration_mdlm import MDLMConfig
from ..modeling.configuration_mdlm_ar import MDLMARConfig
from ..modeling.configuration_published import PublishedConfig
from ..modeling.layers_mdlm import NUM_SINUSOIDS
from ..modeling.modeling_mdlm import MDLMForMaskedDiffusion
from ..modeling.modeling_mdlm_ar import MDLMARForCausalLM
from .checkpoint_reader import CheckpointError, Shell, read_checkpoint, to_plain
from .mdlm_siblings import ALGORITHMS, describe_folder, find_sibling, parameterization, setting
from .output_folder import check_free, new_folder


PREFIX = "backbone."
ROTARY_BUFFER = "rotary_emb.inv_freq"
_SCHEDULES = {"loglinear": "loglinear", "log-linear": "loglinear", "cosine": "cosine", "cosinesqr": "cosine_squared"}


@dataclass(frozen=True)
class CheckpointInfo:
    """
    Attributes:
        weights: `"averaged"` (EMA) or `"raw"`.
        tokenizer: name of the tokenizer that the model was trained with, if the file says so. It is not in the file.
        training_steps: optimiser steps, if the file says so.
    """

    weights: str
    tokenizer: str | None
    training_steps: int | None


class ImportedCheckpoint(NamedTuple):
    model: PreTrainedModel
    info: CheckpointInfo


def load_mdlm_checkpoint(path: str | Path, use_ema: bool = True, **settings: Any) -> ImportedCheckpoint:
    """Read a `.ckpt` file of the MDLM repository, or of one that trains the same models.

    Args:
        path: the file. It is read without running anything in it.
        use_ema: take the averaged weights, which evaluation and sampling use; the raw ones if False.
        settings: fields of `MDLMConfig` that the file does not hold or holds wrongly; and `parameterization="subs"`
            where it does not say what the network predicts.

    Returns:
        The model, an `MDLMForMaskedDiffusion`, or an `MDLMARForCausalLM` if the file is of the autoregressive baseline;
        and what else the file says.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError, a ValueError: if the file is damaged or foreign, if names are missing or too many, if shapes do
            not fit, or if something has to be said by name.
    """
    path = Path(path)
    settings = _accepted(settings)
    if path.is_dir():
        file = path / "config.json"
        model_type = json.loads(file.read_text()).get("model_type") if file.is_file() else None
        raise CheckpointError(f"{path} {describe_folder(model_type)}.")
    checkpoint = read_checkpoint(path)
    try:
        return _import(checkpoint, use_ema, settings)
    except CheckpointError as error:
        raise CheckpointError(f"Cannot import {path}: {error}") from None


def convert_mdlm_checkpoint(
    path: str | Path, output: str | Path, use_ema: bool = True, tokenizer: Any = None, **settings: Any
) -> ImportedCheckpoint:
    """`load_mdlm_checkpoint`, and the model written to the folder `output`, in full or not at all.

    Args:
        tokenizer: a tokenizer to write beside the model. Its mask token is set to the model's.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder.
    """
    output = Path(output)
    check_free(output)
    imported = load_mdlm_checkpoint(path, use_ema, **settings)
    if tokenizer is not None:
        set_mask_token(tokenizer, imported.model.config.mask_token_id)
    with new_folder(output) as folder:
        imported.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return imported


def set_mask_token(tokenizer: Any, mask_token_id: int) -> None:
    """Give `tokenizer` a mask token if it has none. Raises ValueError if its id is not `mask_token_id`."""
    if tokenizer.mask_token_id is None and len(tokenizer) == mask_token_id:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    if tokenizer.mask_token_id != mask_token_id:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens and the mask token {tokenizer.mask_token_id}, but the mask token "
            f"of the model is {mask_token_id}. Pass the tokenizer that the model was trained with, without "
            "tokens that were added to it later."
        )


def _fields(config_class: type) -> list[str]:
    """The settings of a model, without those that all models in transformers have."""
    names = {**PublishedConfig.__annotations__, **config_class.__annotations__}
    return [name for name in names if name != "model_type"]


def _accepted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names. Raises ValueError for a name that there is not."""
    settings = {MDLMConfig.attribute_map.get(name, name): value for name, value in settings.items()}
    accepted = [*_fields(MDLMConfig), "parameterization"]
    for name, value in settings.items():
        if name not in accepted:
            nearest = difflib.get_close_matches(name, accepted, n=1)
            hint = f"Did you mean `{nearest[0]}`?" if nearest else "See `MDLMConfig` for what there is."
            raise ValueError(f"`{name}` is not a setting of MDLM (value {value!r}). {hint}")
    return settings


def _import(checkpoint: dict[str, Any], use_ema: bool, given: dict[str, Any]) -> ImportedCheckpoint:
    hyper_parameters = checkpoint.get("hyper_parameters")
    hyper_parameters = hyper_parameters if isinstance(hyper_parameters, Mapping) else {}
    settings = to_plain(hyper_parameters.get("config"))
    settings = settings if isinstance(settings, dict) else {}
    tokenizer = hyper_parameters.get("tokenizer")

    state_dict = checkpoint.get("state_dict")
    names = set(state_dict) if isinstance(state_dict, Mapping) else set()
    sibling = find_sibling(checkpoint, settings, names)
    if sibling is not None:
        raise CheckpointError(f"it is {ALGORITHMS[sibling]}.")
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"it has no `state_dict`, so it is not a Lightning checkpoint; it holds {_few(checkpoint)}. Name the file "
            "that training wrote."
        )
    weights, inverse_frequencies = _network_weights(state_dict)
    config, shapes = _read_config(weights, inverse_frequencies, settings, tokenizer, given)
    _check_shapes(weights, shapes)
    if use_ema:
        weights = _averaged_weights(checkpoint.get("ema"), weights)

    model_class = MDLMARForCausalLM if isinstance(config, MDLMARConfig) else MDLMForMaskedDiffusion
    model, report = model_class.from_pretrained(
        None,
        config=config,
        # Copies, since the weights are mapped from a file that may go away.
        state_dict={PREFIX + name: tensor.detach().clone() for name, tensor in weights.items()},
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (problem, report[problem])
    steps = checkpoint.get("global_step")
    info = CheckpointInfo(
        weights="averaged" if use_ema else "raw",
        tokenizer=_tokenizer_name(settings, tokenizer),
        training_steps=steps if isinstance(steps, int) else None,
    )
    return ImportedCheckpoint(model.eval(), info)


def _network_weights(state_dict: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The parameters of the network under their plain names, in the file's order, and the rotary buffer."""
    weights: dict[str, torch.Tensor] = {}
    foreign = []
    for key, tensor in state_dict.items():
        name = str(key).replace("_orig_mod.", "")  # torch.compile writes it
        if name.startswith("teacher."):  # of a distillation, which is over
            continue
        if not name.startswith(PREFIX) or not isinstance(tensor, torch.Tensor):
            foreign.append(name)
        else:
            weights[name.removeprefix(PREFIX)] = tensor
    if foreign or not weights:
        raise CheckpointError(
            f"its `state_dict` holds {_few(foreign) or 'nothing'}, where the names of an MDLM checkpoint begin with "
            f"{PREFIX!r}. It is a checkpoint of something else."
        )
    inverse_frequencies = weights.pop(ROTARY_BUFFER, None)
    for name in ("vocab_embed.embedding", "blocks.0.mlp.0.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise CheckpointError(f"`{PREFIX}{name}` is missing or no matrix. It is a checkpoint of something else.")
    return weights, inverse_frequencies


def _averaged_weights(ema: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averaged weights, which the file holds without names, in the order of the raw ones."""
    if not isinstance(ema, Mapping) or not isinstance(ema.get("shadow_params"), list):
        raise CheckpointError("it holds no averaged weights (`ema`). Ask for the raw ones with `use_ema=False`.")
    averaged = ema["shadow_params"]
    if len(averaged) != len(weights):
        raise CheckpointError(
            f"it holds {len(averaged)} averaged weights (`ema`) for {len(weights)} parameters. Ask for the raw ones "
            "with `use_ema=False`."
        )
    for (name, raw), tensor in zip(weights.items(), averaged, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != raw.shape:
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"its averaged weight (`ema`) of `{name}` has the shape {shape}, the raw one {tuple(raw.shape)}. Ask "
                "for the raw ones with `use_ema=False`."
            )
    return dict(zip(weights, averaged, strict=True))


def _read_config(
    weights: Mapping[str, torch.Tensor],
    inverse_frequencies: torch.Tensor | None,
    settings: Mapping[str, Any],
    tokenizer: Any,
    given: Mapping[str, Any],
) -> tuple[MDLMConfig | MDLMARConfig, dict[str, tuple[int, ...]]]:
    """The configuration, and the shapes that it asks for. What is `given` counts before what the file says."""
    given = dict(given)
    is_causal = not any(name.startswith("sigma_map.") for name in weights)
    meaning = given.pop("parameterization", None) or parameterization(settings) or ("ar" if is_causal else None)
    vocab_size, hidden_size = weights["vocab_embed.embedding"].shape
    layers = {
        int(name.split(".")[1]) for name in weights if name.startswith("blocks.") and name.split(".")[1].isdigit()
    }
    conditioning = None if is_causal else weights["sigma_map.mlp.0.bias"].shape[0]

    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": weights["blocks.0.mlp.0.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": setting(settings, "model", "n_heads"),
        "max_position_embeddings": setting(settings, "model", "length"),
        "mask_token_id": _mask_token_id(tokenizer, vocab_size),
    }
    for ours, theirs in {"hidden_size": "hidden_size", "num_hidden_layers": "n_blocks"}.items():
        said = setting(settings, "model", theirs)
        if said is not None and said != found[ours]:
            raise CheckpointError(f"its hyper-parameters say `{theirs}` {said}, but its weights {found[ours]}.")
    if inverse_frequencies is not None and inverse_frequencies.numel():
        found["num_attention_heads"] = hidden_size // (2 * inverse_frequencies.numel())
        _check_rotary(inverse_frequencies, given.get("num_attention_heads", found["num_attention_heads"]), hidden_size)
    dropout = setting(settings, "model", "dropout")
    if dropout is not None:
        found["residual_dropout"] = dropout
    if conditioning is not None:
        found["conditioning_size"] = conditioning
        found["time_conditioning"] = _first(
            setting(settings, "algo", "time_conditioning"), setting(settings, "time_conditioning")
        )
        found |= _read_objective(settings)
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
    if known.get("time_conditioning") and setting(settings, "training", "change_of_variables"):
        raise CheckpointError(
            "it was trained with `change_of_variables` and time conditioning, so its network reads the time in place "
            "of the noise level. That is not supported."
        )
    for name in known if is_causal else ():
        if name not in _fields(MDLMARConfig):
            raise CheckpointError(f"it is of the autoregressive baseline, which has no `{name}`. Leave it out.")
    try:
        config = (MDLMARConfig if is_causal else MDLMConfig)(**known)
    except ValueError as error:
        raise CheckpointError(f"its settings do not make a configuration: {error}") from None
    shapes = _published_shapes(config, conditioning)
    return config, shapes


def _check_rotary(inverse_frequencies: torch.Tensor, num_attention_heads: int, hidden_size: int) -> None:
    """Raise CheckpointError unless the positions turn as MDLM's do, with base 10000 over the width of a head."""
    head_dim = hidden_size // num_attention_heads
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    found = inverse_frequencies.double()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
        raise CheckpointError(
            f"its rotary frequencies ({len(found)}, {found.max():.3g} to {found.min():.3g}) are not those of "
            f"{num_attention_heads} heads in a width of {hidden_size}."
        )


def _read_objective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was trained, as fields of `MDLMConfig`; what the file does not say is left to the defaults."""
    objective: dict[str, Any] = {}
    schedule = setting(settings, "noise", "type")
    if schedule in _SCHEDULES:
        objective["noise_schedule"] = _SCHEDULES[schedule]
    elif schedule in ("linear", "geometric"):
        ends = {end: setting(settings, "noise", end) for end in ("sigma_min", "sigma_max")}
        objective["noise_schedule"] = {"type": schedule, **{end: v for end, v in ends.items() if v is not None}}
    elif schedule is not None:
        objective["noise_schedule"] = None  # has to be said
    least_time = setting(settings, "training", "sampling_eps")
    if isinstance(least_time, float):
        objective["least_time"] = least_time
    if setting(settings, "training", "antithetic_sampling") is not None:
        objective["low_discrepancy"] = bool(setting(settings, "training", "antithetic_sampling"))
    timesteps = _first(setting(settings, "algo", "T"), setting(settings, "T"))
    if timesteps:
        return objective | {"num_timesteps": timesteps}
    if setting(settings, "training", "importance_sampling"):
        objective["time_law"] = "importance"
    return objective


def _published_shapes(config: Any, conditioning_size: int | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the published network; without conditioning, of its causal baseline."""
    width, hidden, vocab_size = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, width)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        shapes |= {f"{block}.attn_qkv.weight": (3 * width, width), f"{block}.attn_out.weight": (width, width)}
        linear(f"{block}.mlp.0", hidden, width)
        linear(f"{block}.mlp.2", width, hidden)
        if conditioning_size is not None:
            linear(f"{block}.adaLN_modulation", 6 * width, conditioning_size)
    shapes["output_layer.norm_final.weight"] = (width,)
    linear("output_layer.linear", vocab_size, width)
    if conditioning_size is not None:
        linear("output_layer.adaLN_modulation", 2 * width, conditioning_size)
        linear("sigma_map.mlp.0", conditioning_size, NUM_SINUSOIDS)
        linear("sigma_map.mlp.2", conditioning_size, conditioning_size)
    return shapes


def _check_shapes(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = [name for name in shapes if name not in weights], [name for name in weights if name not in shapes]
    if missing or extra:
        faults = [f"lacks {_few(missing)}" if missing else "", f"holds {_few(extra)} besides" if extra else ""]
        raise CheckpointError(f"it {' and '.join(filter(None, faults))}, so it is not of MDLM's network.")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"`{PREFIX}{name}` has the shape {tuple(weights[name].shape)}, where {shape} fits the other weights."
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


def _tokenizer_name(settings: Mapping[str, Any], tokenizer: Any) -> str | None:
    named = setting(settings, "data", "tokenizer_name_or_path")
    if named is None and isinstance(tokenizer, Shell) and isinstance(tokenizer.state, dict):
        named = tokenizer.state.get("name_or_path") or None
    return named if isinstance(named, str) else None


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _few(names: Any) -> str:
    """Some of the names, in quotes."""
    names = [f"`{name!s:.80}`" for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
