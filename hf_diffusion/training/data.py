"""Documents in, training texts of equal length out."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"


def load_text(source: str, config_name: str | None = None, split: str = "train", column: str = "text") -> list[str]:
    """The documents of a text file (plain or `.gz`, one document), or of a data set on the Hub (one per row).

    Raises:
        ValueError: if `source` is neither, or holds no text.
    """
    path = Path(source)
    if path.is_file():
        content = path.read_bytes()
        documents = [(gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")]
    elif path.exists() or path.suffix in {".txt", ".gz"}:
        raise ValueError(f"`source`={source!r} is not a file. Name a text file or a data set.")
    else:
        from datasets import load_dataset

        documents = list(load_dataset(source, config_name, split=split)[column])
    if not any(document.strip() for document in documents):
        raise ValueError(f"`source`={source!r} holds no text.")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, the last of which is the end of text, plus the mask symbol.

    The mask symbol's id is `vocab_size`: it stands for a position to fill and needs no row in a model's embedding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(documents), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT, MASK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def vocab_size_without_mask(tokenizer: Any) -> int:
    """Rows in the embedding of a model that never reads the mask symbol: one that comes last needs none."""
    return len(tokenizer) - (tokenizer.mask_token_id == len(tokenizer) - 1)


def _pieces(documents: list[str], size: int = 10_000) -> Iterator[str]:
    # The trainer counts words piece by piece; one huge document would be held several times over.
    for document in documents:
        lines = document.splitlines(keepends=True)
        for start in range(0, len(lines), size):
            yield "".join(lines[start : start + size])


def tokenize(documents: list[str], tokenizer: Any) -> torch.Tensor:
    """All documents as one long tensor of token ids, an end-of-sequence token after each if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        # What looks like a special token in a text is text.
        encoded = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids += encoded["input_ids"] + end
    return torch.tensor(ids, dtype=torch.long)


class TokenTexts(Dataset):
    """Consecutive texts of `length` tokens; what is left at the end is dropped.

    Args:
        tokens: long tensor [n].
        length: tokens in a text.
        block_index: long tensor [length], an order that every text is read in; None leaves it to the collator.
    """

    def __init__(self, tokens: torch.Tensor, length: int, block_index: torch.Tensor | None = None) -> None:
        if len(tokens) < length:
            raise ValueError(f"There are {len(tokens)} tokens, fewer than one text of {length}. Use more text.")
        self.texts = tokens[: len(tokens) // length * length].view(-1, length)
        self.block_index = block_index

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = {"input_ids": self.texts[index]}
        return example if self.block_index is None else {**example, "block_index": self.block_index}
