"""An exponential moving average of the weights, kept beside the ones that are trained."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


FILE_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the trainable weights after every optimiser step, and keeps the average in the Trainer's checkpoints.

    It is the last file of a checkpoint, and there once all others are (see `last_complete_checkpoint`).

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n steps, so that early weights are forgotten.

    Args:
        decay: per optimiser step, in [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # In float32 at least: a step of the average is smaller than bfloat16 can tell.
        self.average = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in _weights(model).items()
        }
        if state.global_step:
            saved = self._path(args, state)
            if not saved.exists():
                raise ValueError(
                    f"Training goes on from step {state.global_step}, but {saved} with its averaged weights is "
                    "missing. Resume from a checkpoint in `output_dir` that was written with this callback."
                )
            for name, weight in load_file(saved).items():
                average = self.average[name]
                if isinstance(average, DTensor):
                    weight = distribute_tensor(weight, average.device_mesh, average.placements)
                average.copy_(weight)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = _weights(model)
        for name, average in self.average.items():
            average.lerp_(weights[name].to(average.dtype), 1 - decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Where weights are sharded, every process has to take part in putting them together.
        whole = {
            name: average.full_tensor() if isinstance(average, DTensor) else average
            for name, average in self.average.items()
        }
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            path = self._path(args, state)
            unfinished = path.with_suffix(".unfinished")
            save_file(whole, unfinished)
            unfinished.replace(path)

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """`model` with the averaged weights for the time of a `with` block."""
        weights = _weights(model)
        trained = {name: weights[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                weights[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in trained.items():
                    weights[name].copy_(weight)

    @staticmethod
    def _path(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE_NAME


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The last of a Trainer's checkpoints in `folder` that was written to its end; None if there is none."""
    complete = {int(path.parent.name.split("-")[-1]): path.parent for path in folder.glob(f"checkpoint-*/{FILE_NAME}")}
    return complete[max(complete)] if complete else None


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Remove what a killed run has left half-written: Trainer would count it among the newest that it keeps."""
    for path in folder.glob("checkpoint-*"):
        if not (path / FILE_NAME).exists():
            shutil.rmtree(path)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
