"""What is trained and how: the settings that all families share, and what a family adds to them.

A family is one file in `families`, with a subclass of `TrainingRecipe`, and one line in `families/__init__.py`. One
that starts from nothing is a `FreshModelRecipe`, which has a size to choose, and a tokenizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from ..modeling.configuration_checks import check_heads
from .data import MASK, train_tokenizer


Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(kw_only=True)
class TrainingRecipe(ABC):
    """Every field is a flag of `hf-diffusion train`; those that a subclass adds belong to its family alone."""

    family: ClassVar[str]
    summary: ClassVar[str]
    """What `--help` says of the family."""
    estimator: ClassVar[str]
    """What the losses of `evaluations` are, and how they are found."""

    text: str = field(metadata={"help": "a text file (.txt or .gz), or a data set on the Hub"})
    output: Path = field(metadata={"help": "folder for the model, its tokenizer, curves and results"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    validation_text: Path | None = field(
        default=None, metadata={"help": "a text file to validate on, in place of the end of the text"}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "share of the text, at its end, to validate on (default: 0.1 if there is no other text)"},
    )
    validation_texts: int = field(
        default=32, metadata={"help": "texts used to validate while training; all at the end"}
    )
    text_length: int = field(default=256, metadata={"help": "tokens in a training text"})
    batch_size: int = field(default=8, metadata={"help": "texts per process and step"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "after warm-up"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    decay_fraction: float = field(
        default=0.2, metadata={"help": "share of the steps, at the end, in which it falls to 0"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights, which are the ones saved"})
    evaluate_every: int = field(default=250, metadata={"help": "steps between evaluations and checkpoints"})
    seed: int = field(default=0, metadata={"help": "of weights, data order, and what a family draws"})
    store_half: bool = field(
        default=False, metadata={"help": "store weights in float16; they are loaded and used in float32 all the same"}
    )
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 mixed precision"})
    resume: bool = field(default=False, metadata={"help": "continue from the last checkpoint in the output folder"})

    def __post_init__(self) -> None:
        self.check_positive("steps", "batch_size", "text_length", "evaluate_every", "validation_texts")
        if self.validation_text is not None:
            if self.validation_fraction is not None:
                raise ValueError(
                    f"`validation_fraction` ({self.validation_fraction}) has no effect with `validation_text`, from "
                    "which nothing is trained on. Leave one of them out."
                )
            if not self.validation_text.is_file():
                raise ValueError(
                    f"`validation_text`={str(self.validation_text)!r} is not a file. Name one, or leave it out to "
                    "validate on the end of `text`."
                )
        elif self.validation_fraction is None:
            self.validation_fraction = 0.1
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be between 0 and 1, got {self.validation_fraction}.")
        if self.dataset_config is not None and Path(self.text).is_file():
            raise ValueError(
                f"`dataset_config`={self.dataset_config!r} has no effect with a text file ({self.text!r}). Leave it "
                "out."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not 0 <= self.decay_fraction <= 1 or self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps}) and the decay ({self.decay_steps} steps) do not fit into "
                f"`steps` ({self.steps}). Lower `warmup_steps` or `decay_fraction`."
            )

    @property
    def decay_steps(self) -> int:
        return round(self.decay_fraction * self.steps)

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @abstractmethod
    def build_tokenizer(self, documents: list[str]) -> Any:
        """A tokenizer with a mask symbol, for training on `documents`."""

    @abstractmethod
    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        """The model as it is before training."""

    @abstractmethod
    def collator(self, tokenizer: Any) -> Collator:
        """Makes batches of what `TokenTexts` and the family's own evaluations hold."""

    @abstractmethod
    def evaluations(self, tokens: torch.Tensor, tokenizer: Any) -> dict[str, Sequence[Dataset]]:
        """What a model is validated on: data sets by name, on which the mean loss is the number reported.

        Several data sets of one name are independent draws of one estimate. All of them hold the whole of the text:
        the mean over them is reported, with its standard error.

        Args:
            tokens: long [n], a text.
        """

    def callbacks(self, collator: Collator) -> list[TrainerCallback]:
        """Callbacks that the family needs, besides those that all have."""
        return []

    def phases(self) -> dict[str, int]:
        """Name and first step of the phases of training, to be marked in the loss curves."""
        return {}


@dataclass(kw_only=True)
class FreshModelRecipe(TrainingRecipe):
    """Of a model whose weights are drawn, and whose tokenizer may be trained on the text."""

    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub name; a new one is trained if not given"}
    )
    vocab_size: int | None = field(default=None, metadata={"help": "of the tokenizer that is trained (default: 2048)"})
    hidden_size: int = field(default=256, metadata={"help": "width of the model"})
    num_hidden_layers: int = field(default=4, metadata={"help": "number of layers"})
    num_attention_heads: int = field(default=8, metadata={"help": "number of attention heads"})
    dropout: float = field(
        default=0.0, metadata={"help": "on sublayers (armd: on embeddings too; llama: on attention instead)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("hidden_size", "num_hidden_layers", "num_attention_heads")
        check_heads(self)
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                f"`vocab_size` ({self.vocab_size}) has no effect with `tokenizer`={self.tokenizer!r}, which has a size "
                "of its own. Leave one of them out."
            )
        if self.tokenizer is None and self.vocab_size is None:
            self.vocab_size = 2048
        if self.vocab_size is not None and self.vocab_size < 258:
            raise ValueError(
                f"`vocab_size` must be at least 258 (every byte, and the end of text), got {self.vocab_size}."
            )

    def build_tokenizer(self, documents: list[str]) -> Any:
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        assert self.vocab_size is not None
        return train_tokenizer(documents, self.vocab_size)

    def shared_config(self, tokenizer: Any) -> dict[str, Any]:
        """What the configurations of all families call by the same names. The size of the vocabulary is not among it:
        whether the mask needs a row is for the family to say."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.text_length,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or Hub name, with a mask symbol if it has none of its own."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer
