"""Settings that look at the text around a token, for text that is drawn in any order.

They see all tokens of a row that are known before a pass, given and drawn, on both sides of the position. Tokens of one
pass do not see each other. From left to right, where nothing is known on the right, each does what the processor of
transformers does for the same setting.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from .configuration import DiffusionGenerationConfig, as_list


@dataclass(frozen=True)
class Known:
    """What is known when tokens are drawn, and where they are drawn.

    Attributes:
        tokens: long [batch, length], the canvas.
        real: bool [batch, length], False at padding.
        known: bool [batch, length], real tokens that are not masked.
        row, column: long [drawn], the positions that draw a token.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    known: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def before(self, column: int) -> torch.Tensor:
        """The tokens of all rows before `column`, long [batch, column], padding in front, masks at gaps."""
        return without_padding_inside(self.tokens[:, :column], self.real[:, :column])

    def around(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [drawn, count] from `first` places after each position that draws (negative: before it) on, and
        whether they are known. Padding is passed over.
        """
        place, text, known = self._as_text()
        places = place[:, None] + first + torch.arange(count, device=place.device)
        inside = (places >= 0) & (places < text.shape[1])
        places, row = places.clamp(0, text.shape[1] - 1), self.row[:, None]
        return text[row, places], known[row, places] & inside

    def windows(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All runs of `size` tokens, long [batch, runs, size], and whether each is known whole, bool [batch, runs]."""
        _, text, known = self._as_text()
        return text.unfold(1, size, 1), known.unfold(1, size, 1).all(dim=-1)

    def _as_text(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The place [drawn] of each position that draws in the rows without padding inside; these; what is known."""
        order = self.real.long().argsort(dim=1, stable=True)
        place = (order.argsort(dim=1))[self.row, self.column]
        return place, self.tokens.gather(1, order), self.known.gather(1, order)


Constraint = Callable[[Known, torch.Tensor], torch.Tensor]
"""Maps what is known, and scores [drawn, vocab_size], to scores."""


def without_padding_inside(tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """`tokens` [batch, length] with all padding in front, as transformers pads prompts."""
    if bool(real.all()):
        return tokens
    return tokens.gather(1, real.long().argsort(dim=1, stable=True))


def build_constraints(
    config: DiffusionGenerationConfig,
    to_fill: torch.Tensor,
    may_end: torch.Tensor,
    too_early_to_end: torch.Tensor,
    eos_token_ids: list[int],
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None,
    vocab_size: int,
) -> list[Constraint]:
    """The constraints of a call, in the order in which transformers applies them.

    Args:
        to_fill: bool [batch, length].
        may_end: bool [batch, length], those of them at which a text may end.
        too_early_to_end: bool [batch, length], positions at which no end token may be drawn.

    Raises:
        ValueError: for settings that are not what transformers wants them to be, or name tokens that there are not.
    """
    constraints: list[Constraint] = []
    if config.sequence_bias is not None:
        biases = SequenceBiasLogitsProcessor(config.sequence_bias).sequence_bias
        constraints += _completions("sequence_bias", biases, vocab_size)
    if config.repetition_penalty not in (None, 1.0):
        constraints.append(_repetition_penalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        constraints.append(_no_repeated_ngram(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        banned = NoBadWordsLogitsProcessor(config.bad_words_ids, eos_token_ids or None).sequence_bias
        constraints += _completions("bad_words_ids", banned, vocab_size)
    if bool(too_early_to_end.any()):
        constraints.append(_suppress_at(too_early_to_end, eos_token_ids))
    if prefix_allowed_tokens_fn is not None:
        constraints.append(_allowed_after_prefix(prefix_allowed_tokens_fn))
    if config.forced_eos_token_id is not None:
        last = may_end & (may_end.cumsum(dim=1) == may_end.sum(dim=1, keepdim=True))
        constraints.append(_force_at(last, as_list(config.forced_eos_token_id)))
    if config.exponential_decay_length_penalty is not None:
        constraints.append(_push_to_end(config.exponential_decay_length_penalty, may_end, eos_token_ids))
    if config.begin_suppress_tokens is not None:
        first = to_fill & (to_fill.cumsum(dim=1) == 1)
        constraints.append(_suppress_at(first, list(config.begin_suppress_tokens)))
    return constraints


def _repetition_penalty(penalty: float) -> Constraint:
    """For tokens that are anywhere in the row, scores above 0 are divided by the penalty, others multiplied (CTRL)."""

    def penalize(known: Known, scores: torch.Tensor) -> torch.Tensor:
        vocab_size = scores.shape[-1]
        used = torch.zeros(len(known.tokens), vocab_size + 1, dtype=torch.bool, device=scores.device)
        used.scatter_(1, known.tokens.masked_fill(~known.known, vocab_size).clamp(max=vocab_size), True)
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(used[known.row, :vocab_size], penalized, scores)

    return penalize


def _no_repeated_ngram(size: int) -> Constraint:
    """No token that would complete, anywhere around its position, a run of `size` tokens that the row has already."""

    def exclude(known: Known, scores: torch.Tensor) -> torch.Tensor:
        if known.tokens.shape[1] < size:
            return scores
        vocab_size = scores.shape[-1]
        runs, complete = (of_rows[known.row] for of_rows in known.windows(size))
        banned = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)

        def ban(token: torch.Tensor, where: torch.Tensor) -> None:
            banned.scatter_(1, token.masked_fill(~where, vocab_size).clamp(max=vocab_size), True)

        places = torch.arange(size, device=scores.device)
        lacking = []  # runs around the position that lack its token alone, which is at each of their places in turn
        for place in places:
            run, is_known = known.around(-int(place), size)
            lacks_no_other = (is_known | (places == place)).all(dim=1, keepdim=True)
            lacking.append((place, run, lacks_no_other))
            same = ((runs == run[:, None]) | (places == place)).all(dim=-1)
            ban(runs[..., place], same & complete & lacks_no_other)
        # Two of them may become the same run.
        for (place, run, of_run), (other_place, other, of_other) in itertools.combinations(lacking, 2):
            token = other[:, place, None]
            same = torch.where(places == place, token, run) == torch.where(places == other_place, token, other)
            ban(token, same.all(dim=1, keepdim=True) & of_run & of_other)
        return scores.masked_fill(banned[:, :vocab_size], -torch.inf)

    return exclude


def _completions(name: str, biases: dict[tuple[int, ...], float], vocab_size: int) -> list[Constraint]:
    """What is added to a token that would complete a sequence, at whichever of its places the row lacks one token."""
    for sequence in biases:
        if not sequence:
            raise ValueError(f"`{name}` holds an empty sequence. Leave it out.")
        if max(sequence) >= vocab_size:
            raise ValueError(f"`{name}` holds {list(sequence)}: tokens must be less than {vocab_size}.")

    def of_length(length: int) -> Constraint:
        chosen = {sequence: bias for sequence, bias in biases.items() if len(sequence) == length}

        def add(known: Known, scores: torch.Tensor) -> torch.Tensor:
            sequences = torch.tensor(list(chosen), device=scores.device)
            bias = torch.tensor(list(chosen.values()), dtype=scores.dtype, device=scores.device)
            scores = scores.clone()
            for place in range(length):
                others = torch.arange(length, device=scores.device) != place
                context, is_known = known.around(-place, length)
                completes = (sequences[:, others] == context[:, None, others]).all(dim=-1)
                completes &= is_known[:, others].all(dim=-1, keepdim=True)
                token = sequences[:, place].expand_as(completes)
                scores.scatter_add_(1, token, torch.where(completes, bias, 0))
            return scores

        return add

    return [of_length(length) for length in sorted({len(sequence) for sequence in biases})]


def _suppress_at(positions: torch.Tensor, token_ids: list[int]) -> Constraint:
    """None of `token_ids` at `positions`, bool [batch, length]."""

    def suppress(known: Known, scores: torch.Tensor) -> torch.Tensor:
        here = positions[known.row, known.column]
        banned = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        banned[token_ids] = True
        return scores.masked_fill(here[:, None] & banned, -torch.inf)

    return suppress


def _force_at(positions: torch.Tensor, token_ids: list[int]) -> Constraint:
    """Nothing but one of `token_ids`, all with the same score, at `positions`, bool [batch, length]."""

    def force(known: Known, scores: torch.Tensor) -> torch.Tensor:
        here = positions[known.row, known.column]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token_ids] = 0
        return torch.where(here[:, None], forced, scores)

    return force


def _push_to_end(penalty: tuple[int, float], may_end: torch.Tensor, eos_token_ids: list[int]) -> Constraint:
    """After the first `penalty[0]` positions `may_end`, bool [batch, length], the size of the score of an end token is
    added to it, times what grows by a factor of `penalty[1]` with every position.
    """
    start, factor = penalty
    over = (may_end.cumsum(dim=1) - 1 - start).clamp(min=0)

    def push(known: Known, scores: torch.Tensor) -> torch.Tensor:
        ends = scores[:, eos_token_ids]
        growth = (factor ** over[known.row, known.column].to(scores.dtype))[:, None] - 1
        scores = scores.clone()
        scores[:, eos_token_ids] = torch.where(ends.isfinite(), ends + ends.abs() * growth, ends)
        return scores

    return push


def _allowed_after_prefix(function: Callable[[int, torch.Tensor], list[int]]) -> Constraint:
    """Only the tokens that `function` allows, given the number of the row and the tokens before the position."""

    def restrict(known: Known, scores: torch.Tensor) -> torch.Tensor:
        banned = torch.ones_like(scores, dtype=torch.bool)
        for column in known.column.unique().tolist():
            before = known.before(column)
            for index in (known.column == column).nonzero()[:, 0].tolist():
                row = int(known.row[index])
                allowed = function(row, before[row])
                if not len(allowed):
                    raise ValueError(
                        f"`prefix_allowed_tokens_fn` allows no token at position {column} of row {row}. Return one at "
                        "least."
                    )
                banned[index, allowed] = False
        return scores.masked_fill(banned, -torch.inf)

    return restrict
