"""Lightning checkpoints of the MDLM repository and its forks: raw and averaged weights, and hyper-parameters.

What network the weights are of is not known here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint_reader import CheckpointError, Shell, read_checkpoint, to_plain
from .mdlm_siblings import ALGORITHMS, describe_folder, find_sibling, setting


@dataclass(frozen=True)
class LightningFile:
    """
    Attributes:
        weights: the raw weights, buffers among them, in the file's order.
        settings: the hyper-parameters, {} if there are none.
        tokenizer: the pickled tokenizer, as a `Shell`; None if there is none.
        training_steps: optimiser steps, if the file says so.
        ema: what the file has under the name of the averaged weights.
        use_ema: whether these are asked for, or the raw ones.
    """

    weights: dict[str, torch.Tensor]
    settings: dict[str, Any]
    tokenizer: Any
    training_steps: int | None
    ema: Any
    use_ema: bool

    def chosen(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The raw `parameters`, or the averaged weights in their place, whichever is asked for.

        Raises:
            CheckpointError: if there are no averaged weights for these parameters, or if numbers among the raw or the
                chosen ones are not real and finite.
        """
        _check_numbers(parameters, "its raw weight", "Take an earlier checkpoint.")
        if not self.use_ema:
            return dict(parameters)
        averaged = self._averaged(parameters)
        _check_numbers(averaged, "its averaged weight (`ema`) of", "Ask for the raw ones with `use_ema=False`.")
        return averaged

    def _averaged(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The averaged weights, which the file holds without names, in the order of the raw `parameters`."""
        if not isinstance(self.ema, Mapping) or not isinstance(self.ema.get("shadow_params"), list):
            raise CheckpointError("it holds no averaged weights (`ema`). Ask for the raw ones with `use_ema=False`.")
        averaged = self.ema["shadow_params"]
        if len(averaged) != len(parameters):
            raise CheckpointError(
                f"it holds {len(averaged)} averaged weights (`ema`) for {len(parameters)} parameters. Ask for the raw "
                "ones with `use_ema=False`."
            )
        for (name, raw), tensor in zip(parameters.items(), averaged, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != raw.shape:
                shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise CheckpointError(
                    f"its averaged weight (`ema`) of `{name}` has the shape {shape}, the raw one {tuple(raw.shape)}. "
                    "Ask for the raw ones with `use_ema=False`."
                )
        return dict(zip(parameters, averaged, strict=True))

    @property
    def tokenizer_name(self) -> str | None:
        named = setting(self.settings, "data", "tokenizer_name_or_path")
        if named is None and isinstance(self.tokenizer, Shell) and isinstance(self.tokenizer.state, dict):
            named = self.tokenizer.state.get("name_or_path") or None
        return named if isinstance(named, str) else None


@contextmanager
def lightning_file(path: str | Path, use_ema: bool) -> Iterator[LightningFile]:
    """The content of the file at `path`, read without running anything in it. Errors in the block name the file.

    Raises:
        ValueError: if `use_ema` is no bool.
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is a folder, damaged, no Lightning checkpoint, or one of another kind of model.
    """
    if not isinstance(use_ema, bool):
        raise ValueError(f"`use_ema` must be True (averaged weights) or False (raw ones), got {use_ema!r:.80}.")
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} {describe_folder(_read_config(path))}.")
    checkpoint = read_checkpoint(path)
    try:
        yield _interpret(checkpoint, use_ema)
    except CheckpointError as error:
        raise CheckpointError(f"Cannot import {path}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder of the Hub's format; None if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    remedy = "Name a checkpoint file in place of its folder."
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:  # of the syntax or of the encoding
        raise CheckpointError(f"{file} is not JSON ({error}). {remedy}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not a configuration. {remedy}")
    return config


def _interpret(checkpoint: Mapping[str, Any], use_ema: bool) -> LightningFile:
    hyper_parameters = checkpoint.get("hyper_parameters")
    hyper_parameters = hyper_parameters if isinstance(hyper_parameters, Mapping) else {}
    settings = to_plain(hyper_parameters.get("config"))
    settings = settings if isinstance(settings, dict) else {}
    state_dict = checkpoint.get("state_dict")
    sibling = find_sibling(checkpoint, settings, set(state_dict) if isinstance(state_dict, Mapping) else set())
    if sibling is not None:
        raise CheckpointError(f"it is {ALGORITHMS[sibling]}.")
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"it has no `state_dict`, so it is not a Lightning checkpoint; it holds {few(checkpoint)}. Name the file "
            "that training wrote."
        )
    weights = {}
    for key, tensor in state_dict.items():
        name = str(key).replace("_orig_mod.", "")  # torch.compile writes it
        if name.startswith("teacher."):  # of a distillation, which is over
            continue
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"its `state_dict` holds {few([name])}, which is no tensor.")
        weights[name] = tensor
    steps = checkpoint.get("global_step")
    return LightningFile(
        weights=weights,
        settings=settings,
        tokenizer=hyper_parameters.get("tokenizer"),
        training_steps=steps if isinstance(steps, int) else None,
        ema=checkpoint.get("ema"),
        use_ema=use_ema,
    )


def _check_numbers(weights: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{what} `{name}` has the dtype {tensor.dtype}, not one of real numbers. {remedy}")
        # NaN and infinity come through a sum, which makes no copies, as `isfinite` does, and takes half the time.
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise CheckpointError(f"{what} `{name}` holds NaN or infinity. {remedy}")


def few(names: Iterable[Any]) -> str:
    """Some of the names, in quotes."""
    quoted = [f"`{name!s:.80}`" for name in names]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "")
