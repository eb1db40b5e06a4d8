"""Training LoMDM: plain texts, which the model masks in an order of its own, validated on a bound with fixed draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from ...diffusion.masking import low_discrepancy
from ...modeling.configuration_lomdm import LoMDMConfig
from ...modeling.modeling_lomdm import LoMDMForMaskedDiffusion
from ..data import TokenTexts
from ..recipe import Collator, FreshModelRecipe
from .mdlm import SeparateSeedsCallback, check_validation_draws, collate_texts


@dataclass(kw_only=True)
class LoMDMRecipe(FreshModelRecipe):
    family = "lomdm"
    summary = "masked diffusion that learns its order"
    estimator = "upper bound on the negative log-likelihood, estimated without bias by the jump chain"

    c1: float = field(default=0.7, metadata={"help": "exponent of a fresh model"})
    c2: float = field(default=0.65, metadata={"help": "how far exponents may differ, less than c1; 0 is MDLM"})
    bound_estimator: str = field(
        default="jump_chain",
        metadata={"help": "how masks are drawn: jump_chain, mask_fraction, power_time or uniform_time"},
    )
    validation_draws: int = field(default=8, metadata={"help": "draws of masks that the bound is estimated from"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_validation_draws(self.validation_draws)
        LoMDMConfig(c1=self.c1, c2=self.c2, bound_estimator=self.bound_estimator)  # raises for what does not fit

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        return LoMDMForMaskedDiffusion(
            LoMDMConfig(
                **self.shared_config(tokenizer),
                vocab_size=len(tokenizer),
                residual_dropout=self.dropout,
                mask_token_id=tokenizer.mask_token_id,
                c1=self.c1,
                c2=self.c2,
                bound_estimator=self.bound_estimator,
            )
        )

    def collator(self, tokenizer: Any) -> Collator:
        return collate_drawn_texts

    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        texts = TokenTexts(tokens, self.text_length).texts
        generator = torch.Generator().manual_seed(0)  # its own: runs with different seeds are validated alike
        return {"bound": [DrawnTexts(texts, generator) for _ in range(self.validation_draws)]}

    def callbacks(self, collator: Collator) -> list[TrainerCallback]:
        return [SeparateSeedsCallback()]


class DrawnTexts(Dataset):
    """Texts with the uniforms that their masks are made of: a model's mean loss on them estimates its bound.

    Without bias, by the jump chain, which leaves out nothing.

    Args:
        texts: long [n, length].
    """

    def __init__(self, texts: torch.Tensor, generator: torch.Generator) -> None:
        self.texts = texts
        numbers = low_discrepancy(torch.rand(len(texts), generator=generator))
        self.numbers = numbers[torch.randperm(len(texts), generator=generator)]
        self.uniforms = torch.rand(texts.shape, generator=generator)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index], "uniforms": (self.numbers[index], self.uniforms[index])}


def collate_drawn_texts(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Texts of equal length to `input_ids` and `labels`, and to `uniforms` of one copy where they bring them."""
    batch = collate_texts(examples)
    if "uniforms" in examples[0]:
        numbers, uniforms = (torch.stack(column) for column in zip(*(e["uniforms"] for e in examples), strict=True))
        batch.update(uniforms=(numbers, uniforms[None]), bound_estimator="jump_chain")
    return batch
