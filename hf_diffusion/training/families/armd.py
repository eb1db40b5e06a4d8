"""Training ARMD: texts in the orders of a curriculum, validated left to right and in parallel streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from ...diffusion.orders import strided_steps
from ...modeling.configuration_armd import ARMDConfig
from ...modeling.modeling_armd import ARMDForMaskedDiffusion
from ..curriculum import CurriculumCallback, OrderCollator, OrderCurriculum
from ..data import TokenTexts, vocab_size_without_mask
from ..recipe import TrainingRecipe


@dataclass(kw_only=True)
class ARMDRecipe(TrainingRecipe):
    family = "armd"
    summary = "strictly causal masked diffusion in any order, for decoding in parallel streams"
    estimator = "negative log-likelihood, exact in the order named"

    validation_streams: tuple[int, ...] = field(
        default=(1, 2, 4, 8), metadata={"help": "numbers of streams to validate with; 1 is left to right"}
    )
    left_neighbour: bool = field(default=True, metadata={"help": "add the left neighbour to the query stream"})
    ramp_start: float = field(default=0.3, metadata={"help": "share of the steps read left to right"})
    ramp_end: float = field(default=0.5, metadata={"help": "share at which max_shuffled is reached"})
    strided_start: float = field(
        default=0.75, metadata={"help": "share at which the strided phase begins; 1 for never"}
    )
    max_shuffled: int = field(default=32, metadata={"help": "tokens out of place at the end of the ramp (rho)"})
    num_streams: tuple[int, ...] = field(default=(1, 2, 4), metadata={"help": "of the strided phase"})
    shuffle: str = field(default="subset", metadata={"help": "subset, windows or ranks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.validation_streams or min(self.validation_streams) < 1:
            raise ValueError(f"`validation_streams` must hold positive numbers, got {self.validation_streams!r}.")
        if self.text_length < max(self.validation_streams):
            raise ValueError(
                f"`text_length` must be at least the most streams validated ({max(self.validation_streams)}), got "
                f"{self.text_length}. Raise it, or lower `validation_streams`."
            )
        self.curriculum()

    def curriculum(self) -> OrderCurriculum:
        return OrderCurriculum(
            ramp_start=round(self.ramp_start * self.steps),
            ramp_end=round(self.ramp_end * self.steps),
            max_shuffled=self.max_shuffled,
            strided_start=round(self.strided_start * self.steps) if self.strided_start < 1 else None,
            num_streams=self.num_streams,
            shuffle=self.shuffle,  # type: ignore[arg-type]
        )

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        return ARMDForMaskedDiffusion(
            ARMDConfig(
                **self.shared_config(tokenizer),
                vocab_size=vocab_size_without_mask(tokenizer),
                residual_dropout=self.dropout,
                left_neighbour=self.left_neighbour,
                mask_token_id=tokenizer.mask_token_id,
            )
        )

    def collator(self, tokenizer: Any) -> OrderCollator:
        return OrderCollator(self.curriculum(), self.seed)

    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        return {
            "left_to_right" if streams == 1 else f"{streams}_streams": [
                TokenTexts(tokens, self.text_length, strided_steps(self.text_length, streams))
            ]
            for streams in self.validation_streams
        }

    def callbacks(self, collator: Any) -> list[TrainerCallback]:
        return [CurriculumCallback(collator)]

    def phases(self) -> dict[str, int]:
        curriculum = self.curriculum()
        phases = {"ramp": curriculum.ramp_start, f"{curriculum.max_shuffled} shuffled": curriculum.ramp_end}
        return phases if curriculum.strided_start is None else {**phases, "strided": curriculum.strided_start}
