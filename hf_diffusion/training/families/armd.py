"""Training ARMD: texts in the orders of a curriculum, validated left to right and in parallel streams."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ...modeling.configuration_armd import ARMDConfig
from ...modeling.modeling_armd import ARMDForMaskedDiffusion
from ..curriculum import OrderCollator, OrderCurriculum
from ..data import vocab_size_without_mask
from ..order_recipe import OrderRecipe
from ..recipe import FreshModelRecipe


@dataclass(kw_only=True)
class ARMDRecipe(OrderRecipe, FreshModelRecipe):
    family = "armd"
    summary = "strictly causal masked diffusion in any order, for decoding in parallel streams"

    left_neighbour: bool = field(default=True, metadata={"help": "add the left neighbour to the query stream"})
    ramp_start: float = field(default=0.3, metadata={"help": "share of the steps read left to right"})
    ramp_end: float = field(default=0.5, metadata={"help": "share at which max_shuffled is reached"})
    strided_start: float = field(
        default=0.75, metadata={"help": "share at which the strided phase begins; 1 for never"}
    )

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

    def phases(self) -> dict[str, int]:
        curriculum = self.curriculum()
        phases = {"ramp": curriculum.ramp_start, f"{curriculum.max_shuffled} shuffled": curriculum.ramp_end}
        return phases if curriculum.strided_start is None else {**phases, "strided": curriculum.strided_start}
