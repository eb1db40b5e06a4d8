"""Checkpoints of LoMDM: those of a fork of the MDLM repository, whose network has two scheduler heads besides.

How that repository names its heads is not public, so their tensors are found by name and shape, or said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..modeling.configuration_lomdm import LoMDMConfig
from ..modeling.modeling_lomdm import LoMDMForMaskedDiffusion
from .checkpoint_reader import CheckpointError
from .imported_checkpoint import ImportedCheckpoint, build, convert
from .lightning_file import lightning_file
from .mdlm_network import (
    PREFIX,
    ROTARY_BUFFER,
    accept_settings,
    check_rotary,
    check_shapes,
    conditioning_size,
    make_config,
    network_weights,
    published_shapes,
    read_architecture,
    read_least_time,
)
from .scheduler_heads import HEADS, Shape, Source, check_sources, head_shapes, match_heads, read_mapping


def load_lomdm_checkpoint(
    path: str | Path, use_ema: bool = True, mapping: Mapping[str, Any] | None = None, **settings: Any
) -> ImportedCheckpoint:
    """Read a `.ckpt` file whose backbone has the names of the MDLM repository, and two scheduler heads.

    Weights do not tell everything: the heads are taken to have the activation and the rotary positions of the backbone,
    and a fused projection to hold queries, keys and values in this order, as the backbone's.

    Args:
        path: the file. It is read without running anything in it.
        use_ema: take the averaged weights, which evaluation and sampling use; the raw ones if False.
        mapping: where parameters of the heads come from, if names and shapes do not tell: by the name of ours, the
            name of a tensor in the file, or `{"name": ..., "rows": [start, stop]}` for a part of one. What it leaves
            out is found by name and shape.
        settings: fields of `LoMDMConfig` that the file does not hold or holds wrongly, such as `c1` and `c2`; and
            `parameterization="subs"` where it does not say what the network predicts.

    Returns:
        A `LoMDMForMaskedDiffusion`, and what else the file says; `info.matched` has what was found by name and shape.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError, a ValueError: if the file is damaged or foreign, if shapes do not fit, if numbers are not
            finite, if something has to be said by name, if the heads are of another network, or if several of their
            tensors could be a parameter.
    """
    given = accept_settings(LoMDMConfig, settings)
    said = read_mapping({} if mapping is None else mapping)
    with lightning_file(path, use_ema) as file:
        network = network_weights(file.weights)
        if conditioning_size(network) is None:
            raise CheckpointError(f"it lacks `{PREFIX}sigma_map`, so its backbone is not that of MDLM.")
        found = read_architecture(network, file) | read_least_time(file.settings)
        found |= {name: _only_number(file.settings, name) for name in ("c1", "c2")}
        config = make_config(LoMDMConfig, found, given, file.settings)
        shapes = published_shapes(config)
        check_shapes(network, shapes)

        parameters: dict[str, torch.Tensor] = {}
        for name, tensor in file.weights.items():
            if name.endswith(ROTARY_BUFFER):  # the backbone's, or a head's own
                check_rotary(tensor, config)
            else:
                parameters[name] = tensor
        backbone = [PREFIX + name for name in shapes]
        tensors = {name: tuple(tensor.shape) for name, tensor in parameters.items() if name not in backbone}
        matched = _match_rest(said, tensors, head_shapes(config))
        sources = {**said, **matched}

        chosen = file.chosen(parameters)
        heads = {name: source.of(chosen) for name, source in sources.items()}
        _check_order({name: source.of(parameters) for name, source in sources.items()}, heads)
        weights = {name: chosen[name] for name in backbone} | heads
        described = {name: str(source) for name, source in matched.items()}
        return build(LoMDMForMaskedDiffusion, config, weights, file, described)


def convert_lomdm_checkpoint(
    path: str | Path,
    output: str | Path,
    use_ema: bool = True,
    mapping: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> ImportedCheckpoint:
    """`load_lomdm_checkpoint`, and the model written to the folder `output`, in full or not at all.

    Args:
        tokenizer: a tokenizer to write beside the model. Its mask token is set to the model's.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder.
    """
    return convert(lambda: load_lomdm_checkpoint(path, use_ema, mapping, **settings), output, tokenizer)


def _match_rest(
    said: Mapping[str, Source], tensors: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> dict[str, Source]:
    """The sources of what the mapping leaves out, from the tensors that it leaves."""
    if not tensors:
        raise CheckpointError("it holds no scheduler heads. If it is of an MDLM, `hf-diffusion convert mdlm` reads it.")
    check_sources(said, tensors, wanted)
    used = {source.name for source in said.values()}
    rest = {name: shape for name, shape in tensors.items() if name not in used}
    return match_heads(rest, {name: shape for name, shape in wanted.items() if name not in said})


def _only_number(settings: Any, name: str) -> float | None:
    """The number of this name anywhere in nested settings; None if there is none, or several that differ."""
    numbers: set[float] = set()
    levels = [settings]
    for level in levels:
        if isinstance(level, Mapping):
            numbers |= {level[name]} if type(level.get(name)) in (int, float) else set()
            levels.extend(level.values())
    return numbers.pop() if len(numbers) == 1 else None


def _check_order(raw: Mapping[str, torch.Tensor], averaged: Mapping[str, torch.Tensor]) -> None:
    """Averaged weights come without names, and the two heads have the same shapes: compare with the raw ones.

    Raises:
        CheckpointError: if the heads are closer to each other than to themselves.
    """
    forward, reverse = HEADS
    own = swapped = 0.0
    for name, tensor in averaged.items():
        head, _, rest = name.partition(".")
        other = f"{reverse if head == forward else forward}.{rest}"
        own += (tensor.double() - raw[name].double()).square().sum().item()
        swapped += (tensor.double() - raw[other].double()).square().sum().item()
    if swapped < own:
        raise CheckpointError(
            "its averaged weights (`ema`) of the scheduler heads are closer to the raw ones of the other head, so they "
            "are in another order than the raw ones. Ask for the raw ones with `use_ema=False`."
        )
