"""`generate` for masked-diffusion models: transformers' contract, for text that is drawn in any order.

The canvas is the prompt with masked positions in it or after it. A strategy lays steps over the masked positions; each
step is one pass of the network, whose logits at the positions of that step are processed and drawn from; given tokens
never change. A family only has to answer `forward(input_ids, attention_mask, block_index, query_positions,
past_key_values, use_cache)`.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from ..diffusion.canvas import check_length, check_tokens, real_positions
from ..diffusion.orders import fill_order
from .configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig, check_together, refuse_unknown
from .output import DiffusionGenerateOutput
from .sampling import sample_categorical
from .strategies import find_strategy
from .streaming import StreamerFeed


EFFECTIVE_FIELDS = {
    *DIFFUSION_FIELDS,
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "suppress_tokens", "num_return_sequences", "use_cache"),
    *("return_dict_in_generate", "eos_token_id", "pad_token_id"),
}
"""Fields of the generation config that `generate` acts on. Any other is refused if it is not at its default."""


class DiffusionGenerationMixin(GenerationMixin):
    generation_config_class = DiffusionGenerationConfig
    generation_config: DiffusionGenerationConfig
    # What a model brings along, declared for type checkers.
    config: Any
    device: Any
    __call__: Any

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
        config = self._resolve_generation_config(generation_config, kwargs)
        strategy = find_strategy(config)
        canvas, attention_mask = self._prepare_canvas(
            input_ids if input_ids is not None else inputs, attention_mask, config
        )
        masked = (canvas == self.config.mask_token_id) & attention_mask.bool()
        block_index = fill_order(masked.cpu(), attention_mask.cpu(), lambda count: strategy.steps(count, config))
        return self._fill(canvas, attention_mask, masked, block_index, config, streamer, generator)

    def _resolve_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> DiffusionGenerationConfig:
        """Settings of this call: `kwargs`, then `generation_config`, then the model's, then the defaults."""
        refuse_unknown(kwargs)
        check_together(kwargs)
        given = DiffusionGenerationConfig.from_generation_config(generation_config or DiffusionGenerationConfig())
        config = copy.deepcopy(given)
        set_in_call = {name for name, value in given.to_dict().items() if value is not None} | kwargs.keys()
        inherited = self.generation_config.to_dict()
        # What the call sets replaces what goes with the model's own setting of the same thing.
        if "strategy" in set_in_call:
            inherited = {name: value for name, value in inherited.items() if name not in DIFFUSION_FIELDS}
        if set_in_call & {"max_length", "max_new_tokens"}:
            inherited = {name: value for name, value in inherited.items() if not name.startswith("max_")}
        if kwargs.keys() & {"max_length", "max_new_tokens"}:
            config.max_length = config.max_new_tokens = None
        defaults = DiffusionGenerationConfig._get_default_generation_params()
        del defaults["max_length"]  # depends on the prompt
        config.update(**inherited, defaults_only=True)
        config.update(**defaults, defaults_only=True)
        config.update(**kwargs)
        for name, value in config.to_dict().items():
            if name.startswith("_") or name in EFFECTIVE_FIELDS or value is None or value == defaults.get(name):
                continue
            if name == "transformers_version" or value is False:
                continue
            raise ValueError(
                f"`{name}`={value!r} has no effect in {type(self).__name__}.generate, and nothing is ignored silently. "
                "Leave it out."
            )
        for token_id in _as_list(config.eos_token_id):
            if not 0 <= token_id < self.config.vocab_size:
                raise ValueError(
                    f"`eos_token_id` must lie in the vocabulary (0 to {self.config.vocab_size - 1}), got {token_id}."
                )
        if config.num_return_sequences < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, got {config.num_return_sequences}.")
        return config

    def _prepare_canvas(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, config: DiffusionGenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and appended masks [batch * num_return_sequences, length], and where there is text."""
        device = self.device
        if input_ids is None:
            input_ids = torch.empty(1, 0, dtype=torch.long)
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                "`inputs` must be an integer tensor [batch, length], got "
                f"{tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__}. Call "
                'the tokenizer with `return_tensors="pt"`.'
            )
        input_ids = input_ids.to(device=device, dtype=torch.long)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
            pad_token_id, others = config.pad_token_id, [*_as_list(config.eos_token_id), self.config.mask_token_id]
            if pad_token_id is not None and pad_token_id not in others:
                attention_mask = (input_ids != pad_token_id).long()
        attention_mask = attention_mask.to(device)
        real = real_positions(input_ids, attention_mask)
        check_tokens(input_ids, real, self.config.vocab_size, self.config.mask_token_id)
        attention_mask = attention_mask.long()

        appended = self._num_appended(input_ids, config)
        input_ids = torch.nn.functional.pad(input_ids, (0, appended), value=self.config.mask_token_id)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, appended), value=1)
        # Positions to fill are text too: prompt and `max_new_tokens` share the context.
        check_length(input_ids, attention_mask.bool(), self.config.max_position_embeddings)
        repeats = config.num_return_sequences
        return input_ids.repeat_interleave(repeats, dim=0), attention_mask.repeat_interleave(repeats, dim=0)

    def _num_appended(self, input_ids: torch.Tensor, config: DiffusionGenerationConfig) -> int:
        length = input_ids.shape[1]
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        if config.max_length is None and bool((input_ids == self.config.mask_token_id).any()):
            return 0
        max_length = config.max_length
        if max_length is None:
            max_length = DiffusionGenerationConfig._get_default_generation_params()["max_length"]
        if max_length < length:
            raise ValueError(
                f"`max_length` ({max_length}) is less than the length of `inputs` ({length}). Raise it, or set "
                "`max_new_tokens`."
            )
        return max_length - length

    def _fill(
        self,
        canvas: torch.Tensor,
        attention_mask: torch.Tensor,
        masked: torch.Tensor,
        block_index: torch.Tensor,
        config: DiffusionGenerationConfig,
        streamer: Any,
        generator: torch.Generator | None,
    ) -> torch.Tensor | DiffusionGenerateOutput:
        """Draw the masked positions of `canvas`, step by step."""
        device, to_fill, may_end = canvas.device, masked.cpu(), _may_end(masked, attention_mask)
        num_given = (attention_mask.cpu().bool() & ~to_fill).sum(dim=1, keepdim=True)
        steps = torch.where(to_fill, block_index - num_given, -1)
        # One uniform per position, drawn in advance: the text does not depend on how rows are batched.
        uniforms = torch.rand(canvas.shape, dtype=torch.float64, generator=generator).to(device)
        processors = self._get_logits_processor(
            generation_config=config, input_ids_seq_length=canvas.shape[1], device=str(device)
        )
        eos_token_ids = torch.tensor(_as_list(config.eos_token_id), device=device, dtype=torch.long)
        feed = StreamerFeed(streamer, canvas, masked) if streamer is not None else None
        canvas, block_index, cache, nfe = canvas.clone(), block_index.to(device), None, 0
        for step in range(int(steps.max()) + 1 if steps.numel() else 0):
            query_positions = _positions_where(steps == step).to(device)
            outputs = self(
                input_ids=canvas,
                attention_mask=attention_mask,
                block_index=block_index,
                query_positions=query_positions,
                past_key_values=cache,
                use_cache=config.use_cache,
            )
            cache, nfe = outputs.past_key_values, nfe + 1
            rows, columns = (query_positions >= 0).nonzero(as_tuple=True)
            positions = query_positions[rows, columns]
            logits = outputs.logits[rows, columns]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.config.mask_token_id < logits.shape[-1]:  # text never holds the sign for a position to fill
                logits[:, self.config.mask_token_id] = -torch.inf
            scores = processors(canvas[rows], logits)
            if config.do_sample:
                tokens = sample_categorical(scores, uniforms[rows, positions])
            else:
                tokens = scores.argmax(dim=-1)
            canvas[rows, positions] = tokens
            masked = masked.index_put((rows, positions), torch.zeros_like(tokens, dtype=torch.bool))
            if feed is not None:
                feed.step(canvas, masked)
            if len(eos_token_ids) and bool(_ended(canvas, masked, may_end, eos_token_ids).all()):
                break
        canvas, generated = _cut_after_end(canvas, to_fill.to(device), may_end, eos_token_ids, config.pad_token_id)
        if feed is not None:
            feed.end(canvas)
        if not config.return_dict_in_generate:
            return canvas
        return DiffusionGenerateOutput(
            sequences=canvas,
            nfe=nfe,
            tokens_per_forward=generated.sum(dim=1) / max(nfe, 1),
            steps=torch.where(generated, steps.to(device), -1),
            past_key_values=cache,
        )


def _positions_where(flags: torch.Tensor) -> torch.Tensor:
    """Positions of the True entries of each row of `flags` [batch, length], in order, filled up with -1."""
    counts = flags.sum(dim=1, keepdim=True)
    width = int(counts.max())
    positions = flags.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return positions.masked_fill(torch.arange(width) >= counts, -1)


def _may_end(to_fill: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Bool [batch, length]: positions to fill with no given token after them, where an end token ends the text."""
    given = (attention_mask.bool() & ~to_fill).long()
    return to_fill & (given.flip(1).cumsum(1).flip(1) == 0)


def _ended(
    canvas: torch.Tensor, masked: torch.Tensor, may_end: torch.Tensor, eos_token_ids: torch.Tensor
) -> torch.Tensor:
    """Bool [batch]: rows whose text has ended with no masked position before the end, or with nothing left to fill."""
    gap_before = masked.cumsum(dim=1) > 0
    ends = torch.isin(canvas, eos_token_ids) & may_end
    return (ends & ~gap_before).any(dim=1) | ~masked.any(dim=1)


def _cut_after_end(
    canvas: torch.Tensor,
    to_fill: torch.Tensor,
    may_end: torch.Tensor,
    eos_token_ids: torch.Tensor,
    pad_token_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding at the generated positions after the token that ends the text.

    Returns:
        The canvas, and a bool tensor [batch, length] that is True at generated tokens that are text.
    """
    if not len(eos_token_ids):
        return canvas, to_fill
    ends = torch.isin(canvas, eos_token_ids) & may_end
    after_end = (ends.cumsum(dim=1) - ends.long() > 0) & to_fill
    pad = pad_token_id if pad_token_id is not None else int(eos_token_ids[0])
    return canvas.masked_fill(after_end, pad), to_fill & ~after_end


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


__all__ = ["DiffusionGenerationMixin"]
