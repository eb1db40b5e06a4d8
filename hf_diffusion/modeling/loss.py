"""Cross-entropy of a language-model head that never holds the logits of a whole batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


MAX_LOGITS = 2**24
"""Logits held at once, in elements: 64 MiB in float32."""


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    max_logits: int = MAX_LOGITS,
    *,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean negative log-likelihood of `labels`, in nats per token.

    Args:
        hidden_states, labels, lm_head, vocab_size, max_logits: as in `chunked_nll`.
        num_items_in_batch: what to divide the sum by, where the batch is part of a larger one (gradient accumulation,
            several processes); the number of labels if not given.
        weights: [...], what the negative log-likelihood of each row counts in the sum; 1 if not given.

    Returns:
        A scalar. 0 if there is no label at all.
    """
    labels = labels.to(hidden_states.device)
    predicted = labels != -100
    nll = chunked_nll(hidden_states, labels, lm_head, vocab_size, max_logits)
    if weights is not None:
        nll = nll * weights.masked_fill(~predicted, 0)  # rows without a label may weigh infinity
    count = num_items_in_batch if num_items_in_batch is not None else predicted.sum().clamp(min=1)
    return nll.sum() / (count.to(nll.device) if isinstance(count, torch.Tensor) else count)


def read_shift_labels(others: dict[str, Any]) -> torch.Tensor | None:
    """`shift_labels`, the only argument that `forward` of a causal language model takes without naming it.

    `Trainer` looks for every named argument with "label" in it among the columns of its data, and finds no labels if
    one is lacking.

    Raises:
        TypeError: for any other argument.
    """
    for name in others:
        if name != "shift_labels":
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    return others.get("shift_labels")


def chunked_nll(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """Negative log-likelihood of every label, in nats.

    Rows without a label are left out before the head. Logits are held in float32, at most `max_logits` elements at a
    time; if there is more than one chunk, each is computed again in the backward pass instead of being kept.

    Args:
        hidden_states: [..., hidden_size], input of the head.
        labels: [...], the token each row predicts; -100 where there is none.
        lm_head: maps [rows, hidden_size] to logits [rows, vocab_size].

    Returns:
        [...] in float32 or wider, 0 where there is no label.
    """
    predicted = labels != -100
    # Which rows there are depends on values: under compilation all are kept, and `cross_entropy` skips those without.
    keeps_all = torch.compiler.is_compiling()
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]) if keeps_all else hidden_states[predicted]
    targets = labels.reshape(-1) if keeps_all else labels[predicted]

    def chunk_nll(hidden_chunk: torch.Tensor, target_chunk: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden_chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, target_chunk, ignore_index=-100, reduction="none")

    rows_at_once = max(1, max_logits // vocab_size)
    if rows.shape[0] <= rows_at_once:
        nll = chunk_nll(rows, targets)
    else:
        chunks = zip(rows.split(rows_at_once), targets.split(rows_at_once), strict=True)
        nll = torch.cat([checkpoint(chunk_nll, *chunk, use_reentrant=False) for chunk in chunks])
    if keeps_all:
        return nll.view(labels.shape)
    return nll.new_zeros(labels.shape).masked_scatter(predicted, nll)
