"""`score`: the likelihood of a text under the law by which `generate` draws it.

The text is laid over the canvas, and what a strategy asks for is read as in `generate`, with the true tokens in place
of drawn ones. Which position comes next is then decided as it would be in a generation that had drawn this text. If
nothing is left to chance in that, the product of the tokens' probabilities is the likelihood (DUEL, arXiv 2603.01367).
If orders are drawn, that product is one term of the likelihood, which is its mean over orders; so the mean of its
logarithm is a lower bound. Families have bounds of their own that need fewer passes for it (`BoundEstimator`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion.canvas import check_length, check_tokens, read_text_and_labels, real_positions
from ..diffusion.orders import after_given, check_block_index
from .blocks import lay_blocks
from .compatibility import check_compatible
from .configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig, refuse_unknown
from .ending import Ending
from .recording import Recording
from .sampling import NOT_A_DISTRIBUTION
from .settings import set_default_strategies
from .strategies import SEMI_AUTOREGRESSIVE, find_strategy
from .strategies.filling import Canvas, Strategy
from .uniforms import draw_uniforms, seeds_of_rows


EXACT, ORDERS = "exact", "orders"
DEFAULT_DRAWS = 16


@dataclass(frozen=True)
class Likelihood:
    """
    Attributes:
        log_likelihood: float64 [batch] in nats; a lower bound unless `is_exact`.
        token_log_likelihood: float64 [batch, length], what each token adds to it; 0 at given tokens and padding. None
            where the sum has other parts.
        standard_error: float64 [batch], of an estimated bound: how far other draws would have led. None if exact.
        num_tokens: long [batch], the tokens that are scored.
        is_greedy: bool [batch], whether `generate(do_sample=False)` with the same settings draws just this text; None
            where orders are drawn.
        is_exact: no bound, and nothing drawn.
        estimator: how it was computed; "exact" if it is.
        sampler: whose law this is.
        nfe: network evaluations (forward passes) of the whole batch.
    """

    log_likelihood: torch.Tensor
    token_log_likelihood: torch.Tensor | None
    standard_error: torch.Tensor | None
    num_tokens: torch.Tensor
    is_greedy: torch.Tensor | None
    is_exact: bool
    estimator: str
    sampler: str
    nfe: int


@dataclass(frozen=True)
class ScoredText:
    """
    Attributes:
        input_ids: long [batch, length], without masks.
        labels: long [batch, length], -100 at given tokens and padding.
        attention_mask: long [batch, length], 0 at padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def to_predict(self) -> torch.Tensor:
        """Bool [batch, length], the positions that are scored."""
        return self.labels != -100


class BoundEstimator(ABC):
    """One text, to be scored draw by draw.

    Attributes:
        num_planes: uniforms that a draw takes for each position.
        nfe: passes made so far.
        sampler: whose law is bounded, where that is not what `generate` draws.
        is_greedy: bool [batch], see `Likelihood`; of the last draw, where it is known.
    """

    num_planes: int
    nfe = 0
    sampler: str | None = None
    is_greedy: torch.Tensor | None = None

    @abstractmethod
    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Log-likelihood in nats of one draw, [batch, length] token by token, or [batch] where it has other parts.

        Args:
            uniforms: float64 [batch, planes, length] in [0, 1).
        """


class Decoding(BoundEstimator):
    """The text as one generation would have drawn it: exact for the order that it follows from the uniforms.

    Args:
        model: a `DiffusionGenerationMixin`.
        text: to score.
    """

    def __init__(self, model: Any, text: ScoredText, strategy: Strategy, config: DiffusionGenerationConfig) -> None:
        self.model, self.text, self.strategy, self.config = model, text, strategy, config
        self.num_planes = strategy.num_planes(config)
        self.blocks = lay_blocks(model, text.to_predict, text.attention_mask, config)

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        model, text, to_fill = self.model, self.text, self.text.to_predict
        plan = Canvas(to_fill, self.blocks, uniforms, model.mask_levels)
        filling = self.strategy.begin(self.config, plan)
        if model.reads_block_index:
            assert filling.steps is not None
            self.nfe += 1
            block_index = after_given(filling.steps, text.attention_mask.bool(), model.reads_suffix_first)
            of_tokens, is_most_likely = model.log_likelihood_in_order(text, block_index)
            self.is_greedy = (is_most_likely | ~to_fill).all(dim=1)
            return of_tokens
        is_other = torch.zeros_like(to_fill)

        def draw(scores: torch.Tensor, uniforms: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            tokens = text.labels[drawn]
            is_other[drawn] = scores.argmax(dim=-1) != tokens
            return tokens

        reader = model._make_reader(plan, text.attention_mask, filling, self.config, None, None)
        recording = Recording(to_fill, self.config)
        canvas = text.input_ids.masked_fill(to_fill, model.config.mask_token_id)
        ending = Ending(to_fill, text.attention_mask.bool(), model.config.mask_token_id, self.config)
        model._fill(canvas, to_fill, filling, reader, _as_they_are, ending, self.config, draw, recording, None)
        self.nfe += reader.nfe
        self.is_greedy = ~is_other.any(dim=1)
        return recording.log_probability


def score(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    block_index: torch.Tensor | None,
    num_draws: int | None,
    estimator: str | None,
    generator: torch.Generator | None,
    seed: int | list[int] | None,
    settings: dict[str, Any],
) -> Likelihood:
    """See `DiffusionGenerationMixin.score`."""
    if model.training:
        raise ValueError("`model` is in training mode, and dropout would change the likelihood. Call `model.eval()`.")
    if generator is not None and seed is not None:
        raise ValueError("`generator` and `seed` are both sources of randomness: pass one of them.")
    text = _read_text(model, input_ids, attention_mask, labels)
    if block_index is not None:
        others = {"num_draws": num_draws, "estimator": estimator, **settings}
        return _score_in_order(model, text, block_index, others)
    config, strategy = _read_settings(model, settings)
    if config.strategy != SEMI_AUTOREGRESSIVE or model.has_exact_cache:
        check_length(text.input_ids, text.attention_mask.bool(), model.config.max_position_embeddings)
    by_decoding = EXACT if strategy.num_planes(config) == 1 else ORDERS  # one plane is for tokens, which are given
    estimators = dict(model.bound_estimators(strategy, config))
    estimators[by_decoding] = lambda text: Decoding(model, text, strategy, config)
    name = next(iter(estimators)) if estimator is None else estimator
    if name not in estimators:
        raise ValueError(f"`estimator` must be one of {list(estimators)} for {_sampler(config)}, got {name!r}.")
    is_exact = name == EXACT
    if num_draws is not None and is_exact:
        raise ValueError(
            f"`num_draws` ({num_draws}) has no effect: for {_sampler(config)} nothing is drawn. Leave it out."
        )
    num_draws = 1 if is_exact else DEFAULT_DRAWS if num_draws is None else num_draws
    if num_draws < 2 and not is_exact:
        raise ValueError(f"`num_draws` must be at least 2, got {num_draws}: the standard error comes from several.")
    seeds = seeds_of_rows(seed, len(text.input_ids))
    chosen = estimators[name](text)
    uniforms = draw_uniforms(text.to_predict, num_draws * chosen.num_planes, generator, seeds)
    draws = torch.stack([chosen.draw(each).double() for each in uniforms.split(chosen.num_planes, dim=1)])
    is_greedy = chosen.is_greedy if is_exact else None
    return _likelihood(text, draws, is_greedy, name, chosen.sampler or _sampler(config), chosen.nfe)


def _likelihood(
    text: ScoredText, draws: torch.Tensor, is_greedy: torch.Tensor | None, estimator: str, sampler: str, nfe: int
) -> Likelihood:
    """From draws [draws, batch, length] or [draws, batch]."""
    if bool(draws.isnan().any()):
        raise ValueError(NOT_A_DISTRIBUTION)
    of_tokens = draws.mean(dim=0) if draws.ndim == 3 else None
    totals = draws.sum(dim=2) if draws.ndim == 3 else draws
    is_exact = estimator == EXACT
    error = None if is_exact else totals.std(dim=0) / len(totals) ** 0.5
    num_tokens = text.to_predict.sum(dim=1)
    return Likelihood(totals.mean(dim=0), of_tokens, error, num_tokens, is_greedy, is_exact, estimator, sampler, nfe)


def _score_in_order(model: Any, text: ScoredText, block_index: torch.Tensor, others: dict[str, Any]) -> Likelihood:
    name = type(model).__name__
    if not model.reads_block_index:
        raise ValueError(
            f'`block_index`: {name} reads no order. Name a `strategy`, such as "autoregressive" or "strided".'
        )
    for other, value in others.items():
        if value is not None:
            raise ValueError(
                f"`{other}`={value!r} has no effect with `block_index`, which says the order. Leave it out."
            )
    if block_index.shape != text.input_ids.shape:
        raise ValueError(
            f"`block_index` must have the shape of `input_ids` {tuple(text.input_ids.shape)}, got "
            f"{tuple(block_index.shape)}."
        )
    block_index, real = block_index.to(text.input_ids.device), text.attention_mask.bool()
    check_block_index(block_index, real)
    given, most = real & ~text.to_predict, torch.iinfo(block_index.dtype).max
    last_given = block_index.masked_fill(~given, -1).amax(dim=1)
    first_scored = block_index.masked_fill(~text.to_predict, most).amin(dim=1)
    if bool((last_given >= first_scored).any()):
        raise ValueError(
            "`block_index` puts a given token (-100 in `labels`) after one that is scored: no likelihood given these "
            "tokens would come of it. Put the given ones first."
        )
    of_tokens, is_most_likely = model.log_likelihood_in_order(text, block_index)
    is_greedy = (is_most_likely | ~text.to_predict).all(dim=1)
    return _likelihood(text, of_tokens[None].double(), is_greedy, EXACT, "the order of `block_index`", 1)


def _read_text(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> ScoredText:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            "`input_ids` must be an integer tensor [batch, length], got "
            f"{tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__}."
        )
    if not input_ids.numel():
        raise ValueError(f"`input_ids` of shape {tuple(input_ids.shape)} holds no text: there is nothing to score.")
    vocab_size, mask_token_id = model.config.vocab_size, model.config.mask_token_id
    input_ids = input_ids.to(device=model.device, dtype=torch.long)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(model.device).long()
    check_tokens(input_ids, real_positions(input_ids, mask), vocab_size, mask_token_id)
    labels = input_ids if labels is None else labels.to(model.device)
    return ScoredText(*read_text_and_labels(input_ids, mask, labels, vocab_size, mask_token_id), mask)


def _read_settings(model: Any, settings: dict[str, Any]) -> tuple[DiffusionGenerationConfig, Strategy]:
    refuse_unknown(settings, ("input_ids", "attention_mask", "labels", "block_index", "num_draws", "estimator", "seed"))
    for name in settings:
        if name not in DIFFUSION_FIELDS:
            raise ValueError(
                f"`{name}`={settings[name]!r} has no effect in `score`, which is about the model's own law: "
                "temperature 1, the whole vocabulary, no end. Leave it out."
            )
    config = DiffusionGenerationConfig(**settings)
    config.validate()
    config.use_cache = model.has_exact_cache
    set_default_strategies(model, config)
    strategy = find_strategy(config, model.learns_order)
    check_compatible(model, strategy, config, set(settings))
    for name in ("remasking", "reference_sampler"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(
                f"`{name}`={value!r}: a text comes about in too many ways for its likelihood to be computed. Leave it "
                "out."
            )
    return config, strategy


def _sampler(config: DiffusionGenerationConfig) -> str:
    set_fields = {name: getattr(config, name) for name, default in DIFFUSION_FIELDS.items()}
    shown = [
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}"
        for name, value in set_fields.items()
        if value is not None and value != DIFFUSION_FIELDS[name]
    ]
    return f"generate({', '.join(shown)})"


def _as_they_are(canvas: torch.Tensor, masked: torch.Tensor, drawn: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Scores without any processor."""
    return logits


__all__ = ["BoundEstimator", "Likelihood", "ScoredText", "score"]
