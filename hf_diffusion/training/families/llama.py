"""Training an ordinary autoregressive model, to compare the other families with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..curriculum import OrderCollator
from ..data import TokenTexts, vocab_size_without_mask
from ..recipe import FreshModelRecipe


@dataclass(kw_only=True)
class LlamaRecipe(FreshModelRecipe):
    family = "llama"
    summary = "an ordinary autoregressive model to compare with"
    estimator = "negative log-likelihood, exact"

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        # Three matrices of 8/3 of the width hold what two of 4 times the width hold: as many parameters as ARMD has, up
        # to ARMD's first layer.
        return LlamaForCausalLM(
            LlamaConfig(
                **self.shared_config(tokenizer),
                vocab_size=vocab_size_without_mask(tokenizer),
                intermediate_size=self.hidden_size * 8 // 3,
                attention_dropout=self.dropout,
                bos_token_id=None,
            )
        )

    def collator(self, tokenizer: Any) -> OrderCollator:
        return OrderCollator(start_token_id=tokenizer.eos_token_id)  # so that it too predicts every token

    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        return {"left_to_right": [TokenTexts(tokens, self.text_length)]}
