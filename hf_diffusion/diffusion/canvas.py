"""What a text must be like before a network reads it: shapes, padding, token ids."""

import torch


def real_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Bool [batch, length], True where there is text; None if there is no padding.

    Raises:
        ValueError: if `attention_mask` has another shape than `input_ids`, or a row of padding only.
    """
    if attention_mask is None:
        return None
    check_mask_shape(input_ids, attention_mask)
    real = attention_mask.to(torch.bool)
    if real.shape[1] and not bool(real.any(dim=1).all()):
        raise ValueError(
            "`attention_mask` has a row of zeros only: there is no text in it. Leave that row out of the batch."
        )
    return None if bool(real.all()) else real


def check_mask_shape(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Raise ValueError unless there is one entry for every position."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids` {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}. It marks padding, and says nothing else."
        )


def check_length(input_ids: torch.Tensor, real: torch.Tensor | None, limit: int) -> None:
    """Raise ValueError if a row of `input_ids` [batch, length] holds more than `limit` tokens, padding not counted."""
    check_context(input_ids.shape[1] if real is None else int(real.sum(dim=1).max()), limit)


def check_context(longest: int, limit: int) -> None:
    """Raise ValueError if a text of `longest` tokens is longer than the context, of `limit` tokens."""
    if longest > limit:
        raise ValueError(
            f"`input_ids` holds a text of {longest} tokens, more than the model's context (`max_position_embeddings`="
            f"{limit}). Shorten it; in `generate`, prompt and `max_new_tokens` share the context."
        )


def check_tokens(
    input_ids: torch.Tensor, real: torch.Tensor | None, vocab_size: int, mask_token_id: int | None
) -> None:
    """Raise ValueError for a token that is neither in the vocabulary nor the sign for a position to fill.

    Args:
        input_ids: long [batch, length].
        real: bool [batch, length], False at padding, which may hold any id; None for no padding.
        vocab_size, mask_token_id: of the model.
    """
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if mask_token_id is not None:
        outside &= input_ids != mask_token_id
    if real is not None:
        outside &= real
    if bool(outside.any()):
        raise ValueError(
            f"`input_ids` holds the token id {int(input_ids[outside][0])}, outside the vocabulary (0 to "
            f"{vocab_size - 1}; {mask_token_id} marks a position to fill). Use the tokenizer that belongs to this "
            "model."
        )


def check_no_mask(input_ids: torch.Tensor, mask_token_id: int) -> None:
    """Raise ValueError if `input_ids` of any shape, text that is only to be continued, holds a position to fill."""
    if bool(torch.eq(input_ids, mask_token_id).any()):
        raise ValueError(
            f"`input_ids` holds `mask_token_id` ({mask_token_id}), and a causal language model fills no gaps. "
            "Set `strategy` in `generate`, or load the model with `AutoModelForMaskedLM`."
        )


def read_labels(
    labels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """Labels, long [batch, length]; -100 where there is nothing to predict, which padding is not.

    Values are not looked at while compiling.

    Args:
        labels: [batch, length], of any integer type.
        attention_mask: [batch, length], 0 at padding. One of another kind is left alone.

    Raises:
        ValueError: unless they are tokens of the vocabulary or -100.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(labels.shape)}. "
            "They are the text itself: nothing is shifted."
        )
    if labels.is_floating_point():
        raise ValueError(f"`labels` must hold token ids, integers, got {labels.dtype}.")
    labels = labels.long()
    if attention_mask is not None and attention_mask.ndim == 2:
        check_mask_shape(input_ids, attention_mask)
        labels = labels.masked_fill(attention_mask == 0, -100)
    if torch.compiler.is_compiling():
        return labels
    outside = ((labels < 0) & (labels != -100)) | (labels >= vocab_size)
    if bool(outside.any()):
        raise ValueError(
            f"`labels` holds {int(labels[outside][0])}, which is no token of the vocabulary (0 to {vocab_size - 1}). "
            "Put -100 where there is nothing to predict, and the true tokens, not masks, where there is."
        )
    return labels


def check_no_masks(labels: torch.Tensor, mask_token_id: int) -> None:
    """Raise ValueError for labels [batch, length] among which there is the mask token."""
    if not torch.compiler.is_compiling() and bool((labels == mask_token_id).any()):
        raise ValueError(
            f"`labels` hold the mask token ({mask_token_id}), which is never predicted. Put -100 at positions without "
            "a token to predict."
        )


def read_text_and_labels(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A text without masks, and its labels, -100 at padding too; long [batch, length] both.

    Args:
        input_ids: long [batch, length], masked or not where there is a label.
        attention_mask, labels: as in `read_labels`.

    Raises:
        ValueError: for labels that are no text to predict, and for a text with masks where there is no label.
    """
    labels = read_labels(labels, input_ids, attention_mask, vocab_size)
    check_no_masks(labels, mask_token_id)
    text = torch.where(labels != -100, labels, input_ids)
    hidden = text == mask_token_id
    if attention_mask is not None and attention_mask.shape == text.shape:
        hidden &= attention_mask != 0
    if not torch.compiler.is_compiling() and bool(hidden.any()):
        raise ValueError(
            f"`input_ids` holds the mask token ({mask_token_id}) where there is no label, and a whole text is "
            "needed. Pass its tokens as `labels`."
        )
    return text, labels


def check_query_positions(query_positions: torch.Tensor, batch_size: int, length: int) -> None:
    """Raise ValueError unless `query_positions` [batch, queried] names positions of the text, or -1 for none."""
    if query_positions.ndim != 2 or query_positions.shape[0] != batch_size or query_positions.is_floating_point():
        raise ValueError(
            f"`query_positions` must be an integer tensor [batch={batch_size}, queried], got "
            f"{query_positions.dtype} {tuple(query_positions.shape)}."
        )
    if bool(((query_positions < -1) | (query_positions >= length)).any()):
        raise ValueError(
            f"`query_positions` must hold positions 0..{length - 1}, or -1 for none, got {query_positions.tolist()}."
        )
