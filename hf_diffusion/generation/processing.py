"""From the logits of the network to the scores that tokens are drawn from: constraints and transformers' processors."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import generation
from transformers.generation import LogitsProcessor, LogitsProcessorList

from .configuration import DiffusionGenerationConfig, as_list
from .constraints import Known, build_constraints


READ_NO_TEXT = (
    *(generation.TemperatureLogitsWarper, generation.TopKLogitsWarper, generation.TopPLogitsWarper),
    *(generation.MinPLogitsWarper, generation.TopHLogitsWarper, generation.TypicalLogitsWarper),
    *(generation.EpsilonLogitsWarper, generation.EtaLogitsWarper, generation.SuppressTokensLogitsProcessor),
    *(generation.InfNanRemoveLogitsProcessor, generation.LogitNormalization),
)
"""Processors that look at nothing but the scores: they take all positions of a pass at once."""

CONSTRAINED_HERE = (
    *("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "begin_suppress_tokens"),
    *("min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale"),
)
"""Fields for which transformers' processor is not taken (see `constraints`, `ending` and `guidance`)."""


class Processing:
    """
    Processors that read the text are called once for every column in which a token is drawn, with all rows that draw
    one there: `input_ids` are the tokens before that column, padding in front and `config.mask_token_id` at gaps. From
    left to right that is what transformers hands them.

    Args:
        model: a `DiffusionGenerationMixin`.
        to_fill: bool [batch, length].
        real: bool [batch, length], False at padding.
        may_end: bool [batch, length], those of them at which a text may end.
        too_early_to_end: bool [batch, length], positions at which no end token may be drawn.
        logits_processor, prefix_allowed_tokens_fn: as `generate` takes them.
    """

    def __init__(
        self,
        model: Any,
        config: DiffusionGenerationConfig,
        to_fill: torch.Tensor,
        real: torch.Tensor,
        may_end: torch.Tensor,
        too_early_to_end: torch.Tensor,
        logits_processor: Any,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None,
    ) -> None:
        self.real = real
        eos_token_ids = as_list(config.eos_token_id)
        self.constraints = build_constraints(
            config, to_fill, may_end, too_early_to_end, eos_token_ids, prefix_allowed_tokens_fn, model.config.vocab_size
        )
        settings = copy.copy(config)
        for name in CONSTRAINED_HERE:
            setattr(settings, name, None)
        self.processors = model._get_logits_processor(
            generation_config=settings,
            logits_processor=LogitsProcessorList(logits_processor or []),
            device=str(to_fill.device),
        )

    def __call__(self, canvas: torch.Tensor, masked: torch.Tensor, drawn: torch.Tensor, logits: torch.Tensor) -> Any:
        """Scores [drawn, vocab_size].

        Args:
            canvas: long [batch, length].
            masked: bool [batch, length], what is not known.
            drawn: bool [batch, length], positions that draw a token.
            logits: [drawn, vocab_size], in the order of (row, position).
        """
        row, column = drawn.nonzero(as_tuple=True)
        known = Known(canvas, self.real, self.real & ~masked, row, column)
        scores = logits
        for constraint in self.constraints:
            scores = constraint(known, scores)
        for processor in self.processors:
            if type(processor) in READ_NO_TEXT:
                scores = processor(canvas[row, :0], scores)
            else:
                scores = _column_by_column(processor, known, scores)
        return scores


def _column_by_column(processor: LogitsProcessor, known: Known, scores: torch.Tensor) -> torch.Tensor:
    processed = torch.empty_like(scores)
    for column in known.column.unique().tolist():
        here = known.column == column
        processed[here] = processor(known.before(column)[known.row[here]], scores[here]).to(scores.dtype)
    return processed
