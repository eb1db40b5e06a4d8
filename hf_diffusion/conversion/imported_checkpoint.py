"""What an import gives, how its model is made of named weights, and how it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .lightning_file import LightningFile
from .output_folder import check_free, new_folder


@dataclass(frozen=True)
class CheckpointInfo:
    """
    Attributes:
        weights: `"averaged"` (EMA) or `"raw"`.
        tokenizer: name of the tokenizer that the model was trained with, if the file says so. It is not in the file.
        training_steps: optimiser steps, if the file says so.
        matched: for parameters that were found by names and shapes which nobody has stated, our name and the file's.
    """

    weights: str
    tokenizer: str | None
    training_steps: int | None
    matched: dict[str, str] = field(default_factory=dict)


class ImportedCheckpoint(NamedTuple):
    model: PreTrainedModel
    info: CheckpointInfo


def build(
    model_class: type[PreTrainedModel],
    config: Any,
    weights: Mapping[str, torch.Tensor],
    file: LightningFile,
    matched: Mapping[str, str] | None = None,
) -> ImportedCheckpoint:
    """A model in evaluation mode with `weights`, which bear published names or ours, and what `file` says besides."""
    model, report = model_class.from_pretrained(
        None,
        config=config,
        # Copies, since the weights are mapped from a file that may go away.
        state_dict={name: tensor.detach().clone() for name, tensor in weights.items()},
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (problem, report[problem])
    info = CheckpointInfo(
        weights="averaged" if file.use_ema else "raw",
        tokenizer=file.tokenizer_name,
        training_steps=file.training_steps,
        matched=dict(matched or {}),
    )
    return ImportedCheckpoint(model.eval(), info)


def convert(load: Callable[[], ImportedCheckpoint], output: str | Path, tokenizer: Any) -> ImportedCheckpoint:
    """`load`, and the model written to the folder `output`, in full or not at all, with `tokenizer` if there is one.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder.
    """
    output = Path(output)
    check_free(output)
    imported = load()
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
