"""`generate` for masked-diffusion models: transformers' contract, for text that is drawn in any order.

The canvas is the prompt with masked positions in it or after it. A strategy says which positions the next pass of the
network is asked for and which of the answers are kept; sampling draws tokens there; a reader makes the pass, with
whatever the family keeps between passes. Given tokens never change.
"""

import inspect
from collections.abc import Callable
from time import monotonic
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from .approximate_reader import ApproximateReader
from .blocks import lay_blocks
from .compatibility import check_compatible, is_guided
from .configuration import DiffusionGenerationConfig
from .ending import Ending
from .guidance import GuidedReader, guided_reader
from .output import DiffusionGenerateOutput
from .processing import Processing
from .prompt import prepare_canvas
from .reader import Reader
from .recording import Recording
from .reference_generation import generate_as_reference
from .sampling import Draw, draw_at_random, draw_most_likely, exclude
from .scoring import BoundEstimator, Likelihood, ScoredText, score
from .settings import settings_of_call
from .strategies import find_strategy
from .strategies.filling import Canvas, Filling, Strategy
from .streaming import StreamerFeed
from .uniforms import draw_uniforms, seeds_of_rows


class DiffusionGenerationMixin(GenerationMixin):
    generation_config: DiffusionGenerationConfig
    # What a model brings along, declared for type checkers.
    config: Any
    device: Any
    __call__: Any

    # What a family says about itself.
    reads_block_index = False
    """`forward` takes `block_index`, and with it the order of the whole text before the first pass."""

    reads_suffix_first = False
    """Given text behind the first position to fill is read before most of what is in front of it."""

    learns_order = False
    """The output of `forward` has `exponents`, which say in which order positions want to be revealed."""

    @property
    def has_exact_cache(self) -> bool:
        """`forward` takes `past_key_values` and `use_cache`, and gives the same logits as without."""
        return True

    def new_approximate_cache(self) -> Any:
        """For models without an exact cache: a `SlotCache` with `renew`, to be passed as `past_key_values`."""
        raise NotImplementedError

    @property
    def hides_padding(self) -> bool:
        """What `attention_mask` marks as padding has no effect on the rest."""
        return True

    @property
    def generation_block_size(self) -> int | None:
        """The model draws blocks of so many positions from left to right, and reads nothing after the block."""
        return None

    def default_strategy(self, max_denoising_steps: int | None, in_block: bool) -> str:
        """The strategy for the canvas, or for a block, if the user names none."""
        return "spread" if in_block else "autoregressive"

    def mask_levels(self, num_steps: int) -> torch.Tensor:
        """Expected share of masked positions after 0 to `num_steps` equal steps of time, float64, from 1 to 0."""
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def inputs_of_all_passes(self, filling: Filling) -> dict[str, Any]:
        """Arguments of `forward` that are the same in every pass of a generation, made once."""
        return {}

    def inputs_at_level(self, level: torch.Tensor) -> dict[str, Any]:
        """Arguments of `forward` that depend on the share of masked positions, `level` [batch]."""
        return {}

    def log_likelihood_in_order(self, text: ScoredText, block_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For models that read `block_index`, from one pass: log-probability of every label, float [batch, length] in
        nats, and whether no token is more likely, bool; 0 and False where there is none."""
        raise NotImplementedError

    def bound_estimators(
        self, strategy: Strategy, config: DiffusionGenerationConfig
    ) -> dict[str, Callable[[ScoredText], BoundEstimator]]:
        """Bounds on the likelihood under a strategy that take fewer passes than the text has positions, by the names
        that `score(estimator=...)` takes; the best first."""
        return {}

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which loads a plain `GenerationConfig`; ours keeps its type."""
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        if getattr(loaded, "_from_model_config", False):
            self.generation_config = DiffusionGenerationConfig.from_model_config(self.config)
        else:
            self.generation_config = DiffusionGenerationConfig.from_generation_config(loaded)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible; `generate_batch` comes here as well."""
        raise ValueError(
            "Continuous batching (`generate_batch`) goes from left to right over texts that are laid end to end. Pass "
            "a padded batch to `generate`."
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        generator: torch.Generator | None = None,
        seed: int | list[int] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | DiffusionGenerateOutput:
        r"""
        Fill the masked positions of a text.

        Args:
            inputs: long [batch, length], the prompt; also accepted as `input_ids`. `config.mask_token_id` marks
                positions to fill, wherever they are. None or a length of 0 generates from nothing.
            generation_config: settings; `model.generation_config` if not given.
            logits_processor: processors of transformers, or other functions of tokens and scores. They are called for
                one position at a time, with the tokens before it (see `Processing`).
            stopping_criteria: criteria of transformers. They are asked from left to right as the text settles, with the
                tokens up to a position (see `Ending`).
            prefix_allowed_tokens_fn: maps the number of a row and the tokens before a position, long [n], to the tokens
                that may stand there.
            streamer: is shown the text as it is drawn (see `StreamerFeed`).
            negative_prompt_ids, negative_prompt_attention_mask: with `guidance_scale`, long [batch, length], what the
                texts are led away from (see `guidance`); nothing, if not given.
            generator: source of randomness, on the CPU; torch's global one if not given. A generator gives the same
                text however the rows of a batch are split over calls.
            seed: in place of a generator, one integer for each text, or the first of consecutive ones. A text with a
                seed of its own is the same alone and in any batch, up to the rounding of the network.
            tokenizer: for `stop_strings`.
            kwargs: `attention_mask` [batch, length], 0 at padding (either side); and any field of
                `DiffusionGenerationConfig`. `max_new_tokens` and `max_length` append masked positions.

        Returns:
            Long [batch, length + appended], without the columns that are padding in all rows; a
            `DiffusionGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError: before any pass, for unknown arguments, arguments without effect, and prompts that the model
                cannot read.
        """
        not_supported = {
            "synced_gpus": (synced_gpus, "every process makes the passes that its own texts need"),
            "assistant_model": (assistant_model, "parallel drawing is what the strategies here do"),
            "custom_generate": (custom_generate, "strategies are the place for other ways to draw"),
        }
        for name, (value, reason) in not_supported.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"`{name}` is not supported by {type(self).__name__}.generate: {reason}. Leave it out."
                )
        for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            if value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"`{name}` must be a list, got {type(value).__name__}. Put it into one.")
        input_ids = kwargs.pop("input_ids", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("`inputs` and `input_ids` are the same thing: pass one of them.")
        attention_mask = kwargs.pop("attention_mask", None)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator`, got {type(generator).__name__}.")
        if generator is not None and seed is not None:
            raise ValueError("`generator` and `seed` are both sources of randomness: pass one of them.")
        other_arguments = tuple(inspect.signature(DiffusionGenerationMixin.generate).parameters)
        config, in_call = settings_of_call(self, generation_config, kwargs, other_arguments)
        strategy = find_strategy(config, self.learns_order)
        check_compatible(self, strategy, config, in_call)
        if negative_prompt_ids is not None and not is_guided(config):
            raise ValueError(
                f"`negative_prompt_ids` has no effect without guidance (`guidance_scale`={config.guidance_scale!r}). "
                "Set it above 1."
            )
        if negative_prompt_attention_mask is not None and negative_prompt_ids is None:
            raise ValueError("`negative_prompt_attention_mask` has no effect without `negative_prompt_ids`.")
        prompt = input_ids if input_ids is not None else inputs
        canvas, attention_mask = prepare_canvas(self, prompt, attention_mask, config)
        seeds = seeds_of_rows(seed, len(canvas))
        if config.reference_sampler is not None:
            for name, value in (
                ("streamer", streamer),
                ("logits_processor", logits_processor),
                ("stopping_criteria", stopping_criteria),
                ("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn),
            ):
                if value is not None and value != []:
                    raise ValueError(f"`{name}`: the reference sampler has nothing of the kind. Leave it out.")
            if seeds is not None:
                generator = torch.Generator().manual_seed(seeds[0])
            sequences, nfe = generate_as_reference(self, canvas, attention_mask, config, generator)
            return DiffusionGenerateOutput(sequences, nfe) if config.return_dict_in_generate else sequences

        to_fill = (canvas == self.config.mask_token_id) & attention_mask.bool()
        blocks = lay_blocks(self, to_fill, attention_mask, config)
        ending = Ending(to_fill, attention_mask.bool(), self.config.mask_token_id, config, stopping_criteria, tokenizer)
        processing = Processing(
            self,
            config,
            to_fill,
            attention_mask.bool(),
            ending.may_end,
            ending.too_early,
            logits_processor,
            prefix_allowed_tokens_fn,
        )
        uniforms = draw_uniforms(to_fill, strategy.num_planes(config), generator, seeds)
        plan = Canvas(to_fill, blocks, uniforms, self.mask_levels)
        filling = strategy.begin(config, plan)
        reader = self._make_reader(
            plan, attention_mask, filling, config, negative_prompt_ids, negative_prompt_attention_mask
        )
        feed = StreamerFeed(streamer, canvas, to_fill) if streamer is not None else None
        recording = Recording(to_fill, config) if config.return_dict_in_generate else None
        draw = draw_at_random if config.do_sample else draw_most_likely
        return self._fill(canvas, to_fill, filling, reader, processing, ending, config, draw, recording, feed)

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        block_index: torch.Tensor | None = None,
        num_draws: int | None = None,
        estimator: str | None = None,
        generator: torch.Generator | None = None,
        seed: int | list[int] | None = None,
        **settings: Any,
    ) -> Likelihood:
        r"""
        The log-probability with which `generate` would draw texts, at temperature 1 and at their length.

        It is exact where the order of positions follows from what is known: with "autoregressive", "strided",
        "confidence" and the like. With orders that are drawn it is a lower bound, estimated from several draws.

        Args:
            input_ids: long [batch, length], the texts.
            attention_mask: [batch, length], 0 at padding, which may be anywhere.
            labels: long [batch, length], `input_ids` with -100 at tokens that are given; all are scored if not given.
            block_index: long [batch, length], for ARMD: any order, given tokens first (see `diffusion.orders`).
            num_draws: draws for an estimate, 2 at least; 16 if not given.
            estimator: one of those that the strategy has (an error lists them); the best if not given. "orders" scores
                the text in drawn orders.
            generator, seed: as in `generate`: a text with a seed of its own has the same draws in any batch.
            settings: the strategy and its fields, as in `generate`; the family's own if not given, whatever
                `model.generation_config` says.

        Raises:
            ValueError: before any pass, for texts that the model cannot read, masks where there is no label, settings
                without effect, and a model in training mode; afterwards, if a probability is not a number.
        """
        return score(
            self, input_ids, attention_mask, labels, block_index, num_draws, estimator, generator, seed, settings
        )

    def _make_reader(
        self,
        plan: Canvas,
        attention_mask: torch.Tensor,
        filling: Filling,
        config: DiffusionGenerationConfig,
        negative_prompt_ids: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
    ) -> Reader | GuidedReader:
        inputs = self.inputs_of_all_passes(filling)
        if config.output_hidden_states:
            inputs["output_hidden_states"] = True
        use_cache = bool(config.use_cache) and self.has_exact_cache

        def make_reader(plan: Canvas, attention_mask: torch.Tensor, steps: torch.Tensor | None) -> Reader:
            if config.approximate_cache:
                return ApproximateReader(self, plan, attention_mask, inputs, bool(config.return_dict_in_generate))
            return Reader(self, plan, attention_mask, inputs, steps, use_cache)

        if not is_guided(config) or not bool(plan.to_fill.any()):
            return make_reader(plan, attention_mask, filling.steps)
        return guided_reader(
            make_reader,
            self,
            plan,
            attention_mask,
            filling.steps,
            config,
            negative_prompt_ids,
            negative_prompt_attention_mask,
        )

    def _fill(
        self,
        canvas: torch.Tensor,
        masked: torch.Tensor,
        filling: Filling,
        reader: Reader | GuidedReader,
        processing: Callable[..., torch.Tensor],
        ending: Ending,
        config: DiffusionGenerationConfig,
        draw: Draw,
        recording: Recording | None,
        feed: StreamerFeed | None,
    ) -> torch.Tensor | DiffusionGenerateOutput:
        """Fill the masked positions of `canvas` with what `draw` draws, pass by pass."""
        started, mask_token_id = monotonic(), self.config.mask_token_id
        canvas, passes = canvas.clone(), torch.zeros_like(canvas[:, 0])

        def scores_of(text: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
            return None if recording is None else recording.scores_of(text, drawn)

        while True:
            step = filling.next_pass(masked)
            if step.remasked is not None:
                canvas = canvas.masked_fill(step.remasked, mask_token_id)
                masked = masked | step.remasked
            asked = step.asked & ~ending.ended[:, None]
            rows = asked.any(dim=1).nonzero()[:, 0]
            if not len(rows):
                break
            reading = reader.read(rows, canvas, asked, step.level)
            exclude(mask_token_id, reading.logits)
            drawn = filling.choose(asked, reading.logits, reading.exponents)
            is_drawn = drawn[asked]
            logits = reading.logits[is_drawn]
            # A processor may write over what it is given.
            scores = processing(canvas, masked, drawn, logits.clone() if recording is not None else logits)
            exclude(mask_token_id, scores)
            tokens = draw(scores, step.uniforms[drawn], drawn)
            if recording is not None:
                states = reading.hidden_states
                states = None if states is None else tuple(layer[is_drawn] for layer in states)
                recording.note(drawn, passes, tokens, logits, scores, states)
            canvas[drawn] = tokens
            masked = masked & ~drawn
            passes[rows] += 1
            unsettled = filling.unsettled(masked)
            ending.update(canvas, unsettled, scores_of)
            if config.max_time is not None and monotonic() - started > config.max_time:
                ending.stop(unsettled)
            if feed is not None:
                after_end, width = ending.after_end(), ending.width
                feed.step(ending.pad(canvas)[:, :width], (unsettled & ~after_end)[:, :width])
        # What takes tokens back may know only now that nothing changes any more.
        ending.update(canvas, torch.zeros_like(masked), scores_of)
        sequences = ending.pad(canvas)[:, : ending.width]
        if feed is not None:
            feed.end(sequences)
        if recording is None:
            return sequences
        generated = (ending.to_fill & ~ending.after_end())[:, : ending.width]
        return DiffusionGenerateOutput(
            sequences=sequences,
            nfe=reader.nfe,
            tokens_per_forward=generated.sum(dim=1) / reader.passes.clamp(min=1),
            cache_logit_error=reader.cache_logit_error(),
            past_key_values=reader.cache if len(reader.rows) == len(canvas) else None,
            **recording.outputs(sequences, generated),
        )


__all__ = ["DiffusionGenerationMixin"]
