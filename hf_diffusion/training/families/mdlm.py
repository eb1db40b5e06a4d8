"""Training MDLM: plain texts, which the model masks itself, validated on a bound with masks that stay the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...diffusion.any_order_bound import mask_random_number
from ...diffusion.masking import low_discrepancy
from ...modeling.configuration_mdlm import MDLMConfig
from ...modeling.modeling_mdlm import MDLMForMaskedDiffusion
from ..data import TokenTexts
from ..recipe import Collator, FreshModelRecipe


@dataclass(kw_only=True)
class MDLMRecipe(FreshModelRecipe):
    family = "mdlm"
    summary = "bidirectional masked diffusion"
    estimator = "upper bound on the negative log-likelihood, estimated without bias from random numbers of masks"

    block_size: int | None = field(
        default=None, metadata={"help": "tokens in a block of a text, for block diffusion (default: no blocks)"}
    )
    validation_draws: int = field(default=8, metadata={"help": "draws of masks that the bound is estimated from"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and not 1 <= self.block_size <= self.text_length:
            raise ValueError(
                f"`block_size` must be 1 to `text_length` ({self.text_length}), the tokens in a training text, got "
                f"{self.block_size}. Leave it out for a text without blocks."
            )
        check_validation_draws(self.validation_draws)

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        return MDLMForMaskedDiffusion(
            MDLMConfig(
                **self.shared_config(tokenizer),
                vocab_size=len(tokenizer),
                residual_dropout=self.dropout,
                mask_token_id=tokenizer.mask_token_id,
                block_size=self.block_size,
            )
        )

    def collator(self, tokenizer: Any) -> Collator:
        return collate_texts

    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        texts = TokenTexts(tokens, self.text_length).texts
        # A seed of its own: runs with different seeds are validated with the same masks.
        generator = torch.Generator().manual_seed(0)
        return {
            "bound": [
                MaskedTexts(texts, tokenizer.mask_token_id, generator, self.block_size)
                for _ in range(self.validation_draws)
            ]
        }

    def callbacks(self, collator: Collator) -> list[TrainerCallback]:
        return [SeparateSeedsCallback()]


def check_validation_draws(validation_draws: int) -> None:
    if validation_draws < 2:
        raise ValueError(
            f"`validation_draws` must be at least 2, got {validation_draws}: the standard error comes from how much "
            "they differ."
        )


class MaskedTexts(Dataset):
    """Texts with masks, drawn once: a model's mean loss on them is an unbiased estimate of its bound.

    See `diffusion.any_order_bound`: nothing is left out at either end of time.

    Args:
        texts: long [n, length].
        block_size: of the model; None for a model without blocks.
    """

    def __init__(
        self, texts: torch.Tensor, mask_token_id: int, generator: torch.Generator, block_size: int | None = None
    ) -> None:
        self.texts = texts
        num_texts, length = texts.shape
        num_blocks = 1 if block_size is None else math.ceil(length / block_size)
        # Numbers of masks that are spread evenly over the blocks of all texts, and dealt out at random, so that any
        # block may get any.
        numbers = low_discrepancy(torch.rand(num_texts * num_blocks, generator=generator))
        numbers = numbers[torch.randperm(len(numbers), generator=generator)].view(num_texts, num_blocks)
        token_uniforms = torch.rand(texts.shape, generator=generator)
        self.noised = mask_random_number(texts, numbers, token_uniforms, mask_token_id, block_size)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index], "noised": tuple(values[index] for values in self.noised)}


def collate_texts(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Texts of equal length to `input_ids` and `labels`, and to `noised` where they bring their masks."""
    input_ids = torch.stack([example["input_ids"] for example in examples])
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids}
    if "noised" in examples[0]:
        columns = zip(*(example["noised"] for example in examples), strict=True)
        batch["noised"] = tuple(torch.stack(column) for column in columns)
    return batch


class SeparateSeedsCallback(TrainerCallback):
    """Gives each process masks of its own: Trainer starts all of them with the same seed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(args.seed + args.process_index)
