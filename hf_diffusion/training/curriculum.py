"""In which order each training text is read: ARMD's progressive permutation schedule and its strided phase.

First left to right, then a growing number of positions trade places, and last, for parallel decoding, the strided
order with a number of streams drawn anew at every step.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..diffusion import orders


SHUFFLES = {
    "subset": orders.shuffle_subset,
    "windows": orders.shuffle_windows,
    "ranks": orders.move_to_random_ranks,
}


@dataclass(frozen=True)
class OrderCurriculum:
    """Which order a text is given at which optimiser step.

    Args:
        ramp_start: left to right before this step (the paper's i_AR).
        ramp_end: the number of shuffled tokens grows linearly from 1 to `max_shuffled` until this step (i_perm).
        max_shuffled: number of shuffled tokens from then on (rho).
        strided_start: from this step on, strided order; None for never.
        num_streams: the strided order's number of streams is drawn from these, one for each step. A number that is
            there twice is drawn twice as often; 1 is left to right.
        shuffled_share: share of the steps of the strided phase whose texts are shuffled as before it.
        shuffle: what shuffling k tokens means, which the paper leaves open: "subset" lets k random positions trade
            places, "windows" permutes inside contiguous windows of k, "ranks" moves k positions to random ranks.
    """

    ramp_start: int = 0
    ramp_end: int = 0
    max_shuffled: int = 1
    strided_start: int | None = None
    num_streams: Sequence[int] = (1, 2, 4)
    shuffled_share: float = 0.0
    shuffle: Literal["subset", "windows", "ranks"] = "subset"

    def __post_init__(self) -> None:
        if not 0 <= self.ramp_start <= self.ramp_end:
            raise ValueError(
                f"`ramp_start` ({self.ramp_start}) must be at least 0 and at most `ramp_end` ({self.ramp_end})."
            )
        if self.max_shuffled < 1:
            raise ValueError(f"`max_shuffled` must be at least 1 (left to right), got {self.max_shuffled}.")
        if not self.num_streams or min(self.num_streams) < 1:
            raise ValueError(f"`num_streams` must hold positive numbers, got {self.num_streams!r}.")
        if not 0 <= self.shuffled_share <= 1:
            raise ValueError(f"`shuffled_share` must be between 0 and 1, got {self.shuffled_share}.")
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"`shuffle` must be one of {sorted(SHUFFLES)}, got {self.shuffle!r}.")

    def num_shuffled(self, step: int) -> int:
        """k of the schedule: k(i) = 1 + floor((rho - 1) * clip((i - i_AR) / (i_perm - i_AR), 0, 1))."""
        if step < self.ramp_start:
            return 1
        if step >= self.ramp_end:
            return self.max_shuffled
        return 1 + (self.max_shuffled - 1) * (step - self.ramp_start) // (self.ramp_end - self.ramp_start)

    def draw(self, length: int, step: int, of_step: torch.Generator, of_text: torch.Generator) -> torch.Tensor:
        """`block_index` [length] for one text; `of_step` must be in the same state for all texts of a step."""
        strided = self.strided_start is not None and step >= self.strided_start
        if strided and not (self.shuffled_share and float(torch.rand((), generator=of_step)) < self.shuffled_share):
            choice = int(torch.randint(len(self.num_streams), (1,), generator=of_step))
            return orders.strided_steps(length, min(self.num_streams[choice], length))
        order = SHUFFLES[self.shuffle](length, self.num_shuffled(step), of_text)
        return orders.block_index_from_order(order)


class OrderCollator:
    """Turns texts into a batch with `input_ids`, `labels` and, given a curriculum, the `block_index` of its step.

    Examples may bring `labels`, -100 at a prompt: it is then given, from left to right, and the rest has the order.
    The order of a text depends on the seed, the step and the text, not on the batch that it is in: two processes that
    share a batch draw what one would.

    Args:
        curriculum: None for left to right. Examples that bring a `block_index` keep it, and do not count as a step: a
            Trainer evaluates with the same collator, so evaluation data should bring theirs.
        seed: of the orders.
        batches_per_step: batches that one process takes for an optimiser step (`gradient_accumulation_steps`).
        start_token_id: a token that is given before every text.
    """

    def __init__(
        self,
        curriculum: OrderCurriculum | None = None,
        seed: int = 0,
        batches_per_step: int = 1,
        start_token_id: int | None = None,
    ) -> None:
        self.curriculum = curriculum
        self.seed = seed
        self.batches_per_step = batches_per_step
        self.start_token_id = start_token_id
        self.first_batch = 0
        self.batches = 0

    def start_at(self, step: int) -> None:
        """The next batch is the first one of optimiser step `step`."""
        self.first_batch, self.batches = step * self.batches_per_step, 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [self._started(example["input_ids"], self.start_token_id) for example in examples]
        targets = [self._started(example.get("labels", example["input_ids"]), -100) for example in examples]
        input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        is_text = torch.arange(input_ids.shape[1]) < lengths[:, None]
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        batch = {"input_ids": input_ids, "labels": labels}
        if not bool(is_text.all()):
            batch["attention_mask"] = is_text.long()
        if "block_index" in examples[0]:
            blocks = [_after_given(self._started(example["block_index"], -1)) for example in examples]
        elif self.curriculum is not None:
            step = self._next_step()
            blocks = [self._draw(self.curriculum, *text, step) for text in zip(texts, targets, strict=True)]
        else:
            return batch
        batch["block_index"] = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=orders.NEVER)
        return batch

    def _started(self, values: Any, first: int | None) -> torch.Tensor:
        """`values` of the tokens of a text, with `first` for the start token if there is one."""
        values = torch.as_tensor(values, dtype=torch.long)
        return values if self.start_token_id is None else torch.cat([values.new_tensor([first]), values])

    def _next_step(self) -> int:
        batch = self.batches
        self.batches += 1
        worker = get_worker_info()
        if worker is not None:  # workers take turns, each with its own copy of this object
            batch = batch * worker.num_workers + worker.id
        return (self.first_batch + batch) // self.batches_per_step

    def _draw(self, curriculum: OrderCurriculum, text: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        of_step = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {step}".encode()))
        of_text = torch.Generator().manual_seed(zlib.crc32(text.numpy().tobytes(), of_step.initial_seed()))
        is_target = targets != -100
        steps = torch.full_like(text, -1)
        if bool(is_target.any()):
            steps[is_target] = curriculum.draw(int(is_target.sum()), step, of_step, of_text)
        return _after_given(steps)


def _after_given(steps: torch.Tensor) -> torch.Tensor:
    """`block_index` [length] of a text whose `steps` are negative where it is given."""
    return orders.after_given(steps[None], torch.ones_like(steps, dtype=torch.bool)[None])[0]


class CurriculumCallback(TrainerCallback):
    """Tells an `OrderCollator` at which step it is, at every epoch and when training is resumed."""

    def __init__(self, collator: OrderCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers` keeps copies of the collator that are not told of a new epoch. "
                "Set it to False with an order curriculum."
            )
        self.collator.batches_per_step = args.gradient_accumulation_steps
        self.collator.start_at(state.global_step)
