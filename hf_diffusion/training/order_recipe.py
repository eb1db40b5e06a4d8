"""What training has in common for models that are told an order: its curriculum, and validation in parallel streams."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..diffusion.orders import strided_steps
from .curriculum import CurriculumCallback, OrderCurriculum
from .data import TokenTexts
from .recipe import TrainingRecipe


@dataclass(kw_only=True)
class OrderRecipe(TrainingRecipe):
    estimator = "negative log-likelihood, exact in the order named"

    validation_streams: tuple[int, ...] = field(
        default=(1, 2, 4, 8), metadata={"help": "numbers of streams to validate with; 1 is left to right"}
    )
    max_shuffled: int = field(default=32, metadata={"help": "tokens out of place where a text is shuffled (rho)"})
    num_streams: tuple[int, ...] = field(
        default=(1, 2, 4), metadata={"help": "of strided texts, drawn for each step; 1 is left to right"}
    )
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

    @abstractmethod
    def curriculum(self) -> OrderCurriculum:
        """Which order a text has at which step."""

    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        return {
            "left_to_right" if streams == 1 else f"{streams}_streams": [
                TokenTexts(tokens, self.text_length, strided_steps(self.text_length, streams))
            ]
            for streams in self.validation_streams
        }

    def callbacks(self, collator: Any) -> list[TrainerCallback]:
        return [CurriculumCallback(collator)]
