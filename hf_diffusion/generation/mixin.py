"""`generate` for masked-diffusion models: transformers' contract, for text that is drawn in any order.

The canvas is the prompt with masked positions in it or after it. A strategy says which positions the next pass of the
network is asked for and which of the answers are kept; sampling draws tokens there; a reader makes the pass, with
whatever the family keeps between passes. Given tokens never change.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from .approximate_reader import ApproximateReader
from .blocks import lay_blocks
from .compatibility import check_compatible
from .configuration import (
    DIFFUSION_FIELDS,
    EFFECTIVE_FIELDS,
    LENGTHS,
    DiffusionGenerationConfig,
    as_list,
    check_together,
    refuse_unknown,
)
from .ending import Ending
from .output import DiffusionGenerateOutput
from .prompt import prepare_canvas
from .reader import Reader
from .reference_generation import generate_as_reference
from .sampling import most_likely, sample_categorical
from .strategies import SEMI_AUTOREGRESSIVE, find_strategy
from .strategies.filling import Canvas, Filling, Strategy
from .streaming import StreamerFeed


class DiffusionGenerationMixin(GenerationMixin):
    generation_config: DiffusionGenerationConfig
    # What a model brings along, declared for type checkers.
    config: Any
    device: Any
    __call__: Any

    # What a family says about itself.
    reads_block_index = False
    """`forward` takes `block_index`, and with it the order of the whole text before the first pass."""

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

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which loads a plain `GenerationConfig`; ours keeps its type."""
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        if getattr(loaded, "_from_model_config", False):
            self.generation_config = DiffusionGenerationConfig.from_model_config(self.config)
        else:
            self.generation_config = DiffusionGenerationConfig.from_generation_config(loaded)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | DiffusionGenerateOutput:
        r"""
        Fill the masked positions of a text.

        Args:
            inputs: long [batch, length], the prompt; also accepted as `input_ids`. `config.mask_token_id` marks
                positions to fill, wherever they are. None or a length of 0 generates from nothing.
            generation_config: settings; `model.generation_config` if not given.
            streamer: is shown the text as it is drawn (see `StreamerFeed`).
            generator: source of randomness, on the CPU; torch's global one if not given. A generator gives the same
                text however the rows of a batch of equal length are split over calls.
            kwargs: `attention_mask` [batch, length], 0 at padding (either side); and any field of
                `DiffusionGenerationConfig`. `max_new_tokens` and `max_length` append masked positions.

        Returns:
            Long [batch, length + appended]; a `DiffusionGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError: before any pass, for unknown arguments, arguments without effect, and prompts that the model
                cannot read.
        """
        not_supported = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        for name, value in not_supported.items():
            if value is not None and value is not False and value != []:
                raise ValueError(f"`{name}` is not supported by {type(self).__name__}.generate. Leave it out.")

        input_ids = kwargs.pop("input_ids", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("`inputs` and `input_ids` are the same thing: pass one of them.")
        attention_mask = kwargs.pop("attention_mask", None)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator`, got {type(generator).__name__}.")
        config, set_in_call = self._resolve_generation_config(generation_config, kwargs)
        strategy = find_strategy(config, self.learns_order)
        check_compatible(self, strategy, config, set_in_call)
        if config.reference_sampler is not None and streamer is not None:
            raise ValueError("`streamer` sees nothing of the reference sampler. Leave it out.")
        canvas, attention_mask = prepare_canvas(
            self, input_ids if input_ids is not None else inputs, attention_mask, config
        )
        if config.reference_sampler is not None:
            sequences, nfe = generate_as_reference(self, canvas, attention_mask, config, generator)
            return DiffusionGenerateOutput(sequences, nfe) if config.return_dict_in_generate else sequences
        to_fill = (canvas == self.config.mask_token_id) & attention_mask.bool()
        blocks = lay_blocks(self, to_fill, attention_mask, config)
        return self._fill(canvas, attention_mask, to_fill, blocks, strategy, config, streamer, generator)

    def _resolve_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[DiffusionGenerationConfig, set[str]]:
        """Settings of this call: `kwargs`, then `generation_config`, then the model's, then the defaults.

        And the names of those that are not the model's nor the defaults.
        """
        refuse_unknown(kwargs)
        given = DiffusionGenerationConfig.from_generation_config(generation_config or DiffusionGenerationConfig())
        config = copy.deepcopy(given)
        settings = given.as_set()
        if kwargs.keys() & LENGTHS:
            settings = {name: value for name, value in settings.items() if name not in LENGTHS}
        settings.update(kwargs)
        check_together(settings)
        set_in_call = set(settings)
        inherited = self.generation_config.to_dict()
        # What the call sets replaces what goes with the model's own setting of the same thing.
        if "strategy" in set_in_call:
            inherited = {name: value for name, value in inherited.items() if name not in DIFFUSION_FIELDS}
        if set_in_call & LENGTHS:
            inherited = {name: value for name, value in inherited.items() if name not in LENGTHS}
        if kwargs.keys() & LENGTHS:
            config.max_length = config.max_new_tokens = None
        defaults = DiffusionGenerationConfig._get_default_generation_params()
        del defaults["max_length"]  # depends on the prompt
        config.update(**inherited, defaults_only=True)
        config.update(**defaults, defaults_only=True)
        config.update(**kwargs)
        self._set_default_strategies(config)
        for name, value in config.to_dict().items():
            if name.startswith("_") or name in EFFECTIVE_FIELDS or value is None or value == defaults.get(name):
                continue
            if name == "transformers_version" or value is False:
                continue
            raise ValueError(
                f"`{name}`={value!r} has no effect in {type(self).__name__}.generate, and nothing is ignored silently. "
                "Leave it out."
            )
        eos_token_ids, mask_token_id = as_list(config.eos_token_id), self.config.mask_token_id
        for token_id in eos_token_ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise ValueError(
                    f"`eos_token_id` must lie in the vocabulary (0 to {self.config.vocab_size - 1}), got {token_id}."
                )
        if mask_token_id in eos_token_ids or (eos_token_ids and config.pad_token_id == mask_token_id):
            name = "eos_token_id" if mask_token_id in eos_token_ids else "pad_token_id"
            raise ValueError(
                f"`{name}` ({mask_token_id}) is the mask token, the sign for a position to fill, which is never drawn "
                "or left in a text. Name another one."
            )
        if config.num_return_sequences < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, got {config.num_return_sequences}.")
        return config, set_in_call

    def _set_default_strategies(self, config: DiffusionGenerationConfig) -> None:
        if config.strategy is None:
            config.strategy = self.default_strategy(config.max_denoising_steps, in_block=False)
        if config.strategy == SEMI_AUTOREGRESSIVE:
            if config.block_strategy is None:
                config.block_strategy = self.default_strategy(config.max_denoising_steps, in_block=True)
            if config.block_length is None:
                config.block_length = self.generation_block_size

    def _fill(
        self,
        canvas: torch.Tensor,
        attention_mask: torch.Tensor,
        to_fill: torch.Tensor,
        blocks: torch.Tensor,
        strategy: Strategy,
        config: DiffusionGenerationConfig,
        streamer: Any,
        generator: torch.Generator | None,
    ) -> torch.Tensor | DiffusionGenerateOutput:
        """Draw the masked positions of `canvas`, pass by pass."""
        batch_size, length = canvas.shape
        # Uniforms belong to positions and are drawn in advance: the text does not depend on how rows are batched.
        shape = (batch_size, strategy.num_planes(config), length)
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator).to(canvas.device)
        plan = Canvas(to_fill, blocks, uniforms, self.mask_levels)
        filling = strategy.begin(config, plan)
        reader: Reader
        if config.approximate_cache:
            measure = bool(config.return_dict_in_generate)
            reader = ApproximateReader(self, plan, attention_mask, filling, measure)
        else:
            use_cache = bool(config.use_cache) and self.has_exact_cache
            reader = Reader(self, plan, attention_mask, filling, use_cache)
        processors = self._get_logits_processor(
            generation_config=config, input_ids_seq_length=length, device=str(canvas.device)
        )
        ending = Ending(to_fill, attention_mask, as_list(config.eos_token_id), config.pad_token_id)
        feed = StreamerFeed(streamer, canvas, to_fill) if streamer is not None else None
        canvas, masked, steps = canvas.clone(), to_fill, torch.full_like(canvas, -1)
        while True:
            step = filling.next_pass(masked)
            if step.remasked is not None:
                canvas = canvas.masked_fill(step.remasked, self.config.mask_token_id)
                masked = masked | step.remasked
            asked = step.asked & ~ending.reached(canvas, filling.unsettled(masked))[:, None]
            rows = asked.any(dim=1).nonzero()[:, 0]
            if not len(rows):
                break
            logits, exponents = reader.read(rows, canvas, asked, step.level)
            if self.config.mask_token_id < logits.shape[-1]:  # text never holds the sign for a position to fill
                logits[:, self.config.mask_token_id] = -torch.inf
            kept = filling.choose(asked, logits, exponents)
            scores = processors(canvas[kept.nonzero()[:, 0]], logits[kept[asked]])
            if config.do_sample:
                canvas[kept] = sample_categorical(scores, step.uniforms[kept])
            else:
                canvas[kept] = most_likely(scores)
            steps = torch.where(kept, reader.passes[:, None] - 1, steps)
            masked = masked & ~kept
            if feed is not None:
                feed.step(canvas, filling.unsettled(masked))
        canvas, generated = ending.cut(canvas)
        if feed is not None:
            feed.end(canvas)
        if not config.return_dict_in_generate:
            return canvas
        return DiffusionGenerateOutput(
            sequences=canvas,
            nfe=reader.nfe,
            tokens_per_forward=generated.sum(dim=1) / reader.passes.clamp(min=1),
            steps=torch.where(generated, steps, -1),
            cache_logit_error=reader.cache_logit_error(),
            past_key_values=reader.cache if len(reader.rows) == batch_size else None,
        )


__all__ = ["DiffusionGenerationMixin"]
