"""Cross-entropy of a language-model head that never holds the logits of a whole batch."""

from collections.abc import Callable

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

    Rows without a label are left out before the head. Logits are held in float32, at most `max_logits` elements at a
    time; if there is more than one chunk, each is computed again in the backward pass instead of being kept.

    Args:
        hidden_states: [..., hidden_size], input of the head.
        labels: [...], the token each row predicts; -100 where there is none.
        lm_head: maps [rows, hidden_size] to logits [rows, vocab_size].
        num_items_in_batch: what to divide the sum by, where the batch is part of a larger one (gradient accumulation,
            several processes); the number of labels if not given.
        weights: [...], what the negative log-likelihood of each row counts in the sum; 1 if not given.

    Returns:
        A scalar. 0 if there is no label at all.
    """
    labels = labels.to(hidden_states.device)
    predicted = labels != -100
    if not torch.compiler.is_compiling():
        # A data-dependent shape; under compilation the rows are kept and `cross_entropy` skips them.
        hidden_states, labels = hidden_states[predicted], labels[predicted]
        weights = weights[predicted] if weights is not None else None
    hidden_states, labels = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
    weights = weights.reshape(-1) if weights is not None else None

    def chunk_loss(
        hidden_chunk: torch.Tensor, label_chunk: torch.Tensor, weight_chunk: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = lm_head(hidden_chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if weight_chunk is None:
            return F.cross_entropy(logits, label_chunk, ignore_index=-100, reduction="sum")
        nll = F.cross_entropy(logits, label_chunk, ignore_index=-100, reduction="none")
        # Rows without a label may weigh infinity, which 0 would not silence.
        return (nll * weight_chunk.masked_fill(label_chunk == -100, 0)).sum()

    rows = max(1, max_logits // vocab_size)
    if hidden_states.shape[0] <= rows:
        total = chunk_loss(hidden_states, labels, weights)
    else:
        columns = [hidden_states, labels] if weights is None else [hidden_states, labels, weights]
        chunks = zip(*(column.split(rows) for column in columns), strict=True)
        total = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    count = num_items_in_batch if num_items_in_batch is not None else predicted.sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
