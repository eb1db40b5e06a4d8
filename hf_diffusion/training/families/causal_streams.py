"""Teaching a pretrained causal model to write in parallel streams: an adapter, which leaves the model as it is.

What is trained is LoRA on attention, and the gap vector. They are saved as a PEFT adapter: with it the model is better
in streams, without it (`disable_adapter`) it is the pretrained one, to the bit.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ...conversion.causal_lm import from_causal_lm, start_token
from ..curriculum import OrderCollator, OrderCurriculum
from ..order_recipe import OrderRecipe
from ..recipe import load_tokenizer


@dataclass(kw_only=True)
class CausalStreamsRecipe(OrderRecipe):
    family = "causal_streams"
    summary = "a pretrained causal model that learns to write in parallel streams, by LoRA"

    from_causal_lm: str = field(metadata={"help": "folder or Hub name of the causal model"})
    later_text: str = field(default="wrap", metadata={"help": "how text on the right is read: wrap, native or hide"})
    start_token_id: int | None = field(
        default=None,
        metadata={"help": "stands before every text, and the gap vector starts from it (default: the model's own)"},
    )
    lora_rank: int = field(default=16, metadata={"help": "of the adapter"})
    shuffled_share: float = field(default=0.2, metadata={"help": "share of the steps whose texts are shuffled"})
    # A fifth of what is not shuffled is read left to right.
    num_streams: tuple[int, ...] = field(
        default=(1, 2, 2, 4, 4), metadata={"help": "of strided texts, drawn for each step; 1 is left to right"}
    )
    batch_size: int = field(default=2, metadata={"help": "texts per process and step"})
    steps: int = field(default=300, metadata={"help": "optimiser steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "after warm-up"})
    warmup_steps: int = field(default=10, metadata={"help": "steps of linear warm-up"})
    decay_fraction: float = field(
        default=0.9, metadata={"help": "share of the steps, at the end, in which it falls to 0"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("lora_rank")

    def curriculum(self) -> OrderCurriculum:
        return OrderCurriculum(
            max_shuffled=self.max_shuffled,
            strided_start=0,
            num_streams=self.num_streams,
            shuffled_share=self.shuffled_share,
            shuffle=self.shuffle,  # type: ignore[arg-type]
        )

    def build_tokenizer(self, documents: list[str]) -> Any:
        return load_tokenizer(self.from_causal_lm)

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        from peft import LoraConfig, get_peft_model

        model = from_causal_lm(
            self.from_causal_lm,
            later_text=self.later_text,  # type: ignore[arg-type]
            gap_token_id=self.start_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype=torch.float32,
        )
        adapter = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, modules_to_save=["gap"])
        return get_peft_model(model, adapter)  # type: ignore[return-value]

    def collator(self, tokenizer: Any) -> OrderCollator:
        config = AutoConfig.from_pretrained(self.from_causal_lm)
        return OrderCollator(self.curriculum(), self.seed, start_token_id=start_token(config, self.start_token_id))
