"""MDLM: a bidirectional transformer that reads a text with masks in it and predicts what they hide (arXiv 2406.07524).

The network is a diffusion transformer (DiT): every layer is shifted, scaled and gated by a function of the noise level.
Most published models are not told the noise level; for them that function is a constant. With `config.block_size` the
text is generated block after block (BD3-LM, arXiv 2503.09573): what is read is never later, and a cache is exact.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from ..diffusion.canvas import check_no_masks, read_labels
from ..diffusion.masking import NoisedText, draw_noised_text
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.scoring import BoundEstimator, ScoredText
from ..generation.strategies.filling import Filling, Strategy
from ..generation.strategies.first_hitting import FIRST_HITTING
from .absent_arguments import without_absent_arguments
from .approximate_cache_mdlm import ApproximateMDLMCache, rows_not_kept
from .blocks_mdlm import next_rows, two_copies
from .bound_mdlm import NumberOfMasks
from .cache_mdlm import MDLMCache
from .configuration_mdlm import MDLMConfig
from .initial_std import linear_with_std
from .inputs_mdlm import check_cache, check_noised, read_noise_level, read_text
from .layers_mdlm import MDLMLayer, NoiseEmbedding, modulate, take_rows
from .loss import chunked_cross_entropy
from .outputs import MaskedDiffusionOutput, QueryModelOutput
from .published_mdlm import PublishedModel, PublishedModelWithHead
from .rows_mdlm import Rows, places_in_text, whole_text


Modulations = tuple[torch.Tensor, ...]
"""Shifts, scales and gates: [batch or 1, 1, 6 * hidden_size] of each layer, [.., 2 * hidden_size] of the final norm."""


class MDLMModel(PublishedModel):
    """The network without its head: one hidden state per position."""

    config: MDLMConfig
    _no_split_modules = ["MDLMLayer"]
    _keep_in_fp32_modules = ["noise_embedding.in_proj", "noise_embedding.out_proj"]  # nor are they ever quantised

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.noise_embedding = NoiseEmbedding(config)
        self.layers = nn.ModuleList([MDLMLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.final_shift_scale = linear_with_std(config.conditioning_size, 2 * config.hidden_size, std=0.0, bias=True)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def modulations(
        self, sigma: torch.Tensor | float | None = None, t: torch.Tensor | float | None = None
    ) -> Modulations:
        """Everything in the network that depends on the noise level alone, for `forward(modulations=...)`.

        Without time conditioning it is a constant of the weights: made once, it serves every pass of a generation.

        Args:
            sigma, t: as in `MDLMForMaskedDiffusion.forward`.
        """
        noise_level = read_noise_level(self.config, sigma, t, self.device)
        conditioning = self.noise_embedding(noise_level, self.embed_tokens.weight.dtype)
        modules: list[Any] = [*(layer.modulation for layer in self.layers), self.final_shift_scale]
        return tuple(module(conditioning)[:, None] for module in modules)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sigma: torch.Tensor | float | None = None,
        t: torch.Tensor | float | None = None,
        modulations: Modulations | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: MDLMCache | ApproximateMDLMCache | None = None,
        clean_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> QueryModelOutput:
        """See `MDLMForMaskedDiffusion.forward`; returns hidden states in place of logits.

        Args:
            clean_ids: long [batch, length], for models with `block_size`: the text that `input_ids` has been made of.
                Every block of `input_ids` then reads itself and the blocks of `clean_ids` before it.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        conditioning = None
        if modulations is None:
            conditioning = self.noise_embedding(
                read_noise_level(self.config, sigma, t, input_ids.device, input_ids.shape[0]),
                self.embed_tokens.weight.dtype,
            )
        elif sigma is not None or t is not None:
            raise ValueError("`modulations` hold the noise level already: leave out `sigma` and `t`.")
        if self.config.attend_to_padding:
            attention_mask = None
        real = read_text(input_ids, attention_mask, query_positions, self.config)
        if real is not None:
            input_ids = input_ids.masked_fill(~real, self.mask_token_id)
            clean_ids = clean_ids.masked_fill(~real, self.mask_token_id) if clean_ids is not None else None
        rows = self._plan_rows(input_ids, real, attention_mask, query_positions, past_key_values, clean_ids)
        hidden_states = self.embed_tokens(rows.input_ids)
        rotary = self.rotary_emb(hidden_states, rows.places)
        # Nobody reads the last layer but the head, so rows that are not asked for end there.
        if self.config.block_size is None and past_key_values is None:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
            can_end = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)
            last_rows = rows.answer if can_end else None
            last_mask = mask if last_rows is None else _mask_rows(mask, last_rows)
        else:
            mask, last_mask = rows.masks(self.config, hidden_states)
            last_rows = rows.answer

        states_of_layers = [hidden_states]
        for layer_idx, layer in enumerate(self.layers):
            is_last = layer_idx == self.config.num_hidden_layers - 1
            hidden_states = layer(
                hidden_states,
                last_mask if is_last else mask,
                rotary,
                conditioning,
                modulations[layer_idx] if modulations is not None else None,
                last_rows if is_last else None,
                past_key_values=past_key_values,
            )
            states_of_layers.append(hidden_states)
        if past_key_values is not None:
            assert rows.state_after is not None
            past_key_values.finish(rows.state_after)

        def answer(states: torch.Tensor) -> torch.Tensor:
            """The rows that were asked for."""
            return states if rows.answer is None else take_rows(states, rows.answer)

        earlier, last = states_of_layers[:-1], states_of_layers[-1]
        last = last if last_rows is not None else answer(last)
        shift_scale = modulations[-1] if modulations is not None else self.final_shift_scale(conditioning)[:, None]
        return QueryModelOutput(
            last_hidden_state=modulate(self.norm(last), *shift_scale.chunk(2, dim=-1)),
            past_key_values=past_key_values,
            hidden_states=(*map(answer, earlier), last) if output_hidden_states else None,
        )

    def _plan_rows(
        self,
        input_ids: torch.Tensor,
        real: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        query_positions: torch.Tensor | None,
        past_key_values: MDLMCache | ApproximateMDLMCache | None,
        clean_ids: torch.Tensor | None,
    ) -> Rows:
        if past_key_values is not None:
            kind = ApproximateMDLMCache if self.config.block_size is None else MDLMCache
            check_cache(
                past_key_values,
                kind,
                query_positions,
                attention_mask,
                input_ids.shape[0],
                self.config.num_hidden_layers,
            )
            if self.training and self.gradient_checkpointing:
                raise ValueError(
                    "`past_key_values` does not go with gradient checkpointing, which would write it twice. Call "
                    "`model.eval()`, or leave it out."
                )
            assert query_positions is not None
            if isinstance(past_key_values, ApproximateMDLMCache):
                return rows_not_kept(input_ids, real, query_positions, past_key_values, self.mask_token_id)
            return next_rows(input_ids, real, query_positions, past_key_values, self.config)
        if clean_ids is not None:
            assert self.config.block_size is not None
            return two_copies(input_ids, clean_ids, real, self.config.block_size)
        return whole_text(input_ids, real, query_positions, self.config.block_size)


class MDLMForMaskedDiffusion(PublishedModelWithHead, DiffusionGenerationMixin):
    """MDLM with its language-model head: what masks hide, and a bound on the likelihood of a text."""

    config: MDLMConfig
    generation_config_class = DiffusionGenerationConfig
    model_class = MDLMModel

    @property
    def has_exact_cache(self) -> bool:
        return self.config.block_size is not None

    def new_approximate_cache(self) -> ApproximateMDLMCache:
        return ApproximateMDLMCache(self.config.num_hidden_layers)

    @property
    def hides_padding(self) -> bool:
        return not self.config.attend_to_padding

    @property
    def generation_block_size(self) -> int | None:
        return self.config.block_size

    def default_strategy(self, max_denoising_steps: int | None, in_block: bool) -> str:
        if self.config.block_size is not None and not in_block:
            return "semi_autoregressive"
        return "first_hitting" if max_denoising_steps is None else "ancestral"

    def mask_levels(self, num_steps: int) -> torch.Tensor:
        schedule, t = self.config.make_schedule(), torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        levels = schedule.mask_probability(t) / schedule.mask_probability(t[0])
        levels[-1] = 0.0  # some schedules mask tokens at time 0 already; the last step reveals them too
        return levels

    def inputs_of_all_passes(self, filling: Filling) -> dict[str, Any]:
        return {} if self.config.time_conditioning else {"modulations": self.model.modulations()}

    def inputs_at_level(self, level: torch.Tensor) -> dict[str, Any]:
        if not self.config.time_conditioning:
            return {}
        schedule = self.config.make_schedule()
        most = schedule.mask_probability(torch.ones((), dtype=torch.float64, device=level.device))
        return {"t": schedule.time_at_mask_probability(level * most).clamp(0, 1)}

    def bound_estimators(
        self, strategy: Strategy, config: DiffusionGenerationConfig
    ) -> dict[str, Callable[[ScoredText], BoundEstimator]]:
        in_own_blocks = config.strategy == "semi_autoregressive" and self.config.block_size is not None
        if strategy is FIRST_HITTING and (config.strategy == strategy.name or in_own_blocks):
            return {"number_of_masks": partial(NumberOfMasks, self)}
        return {}

    @can_return_tuple
    @without_absent_arguments
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sigma: torch.Tensor | float | None = None,
        t: torch.Tensor | float | None = None,
        modulations: Modulations | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: MDLMCache | ApproximateMDLMCache | None = None,
        use_cache: bool | None = None,
        noised: NoisedText | tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedDiffusionOutput:
        r"""
        Row n of the logits predicts token n from all visible tokens; with `config.block_size`, from those of its own
        block and of earlier ones. Their softmax is the law of the token that a mask at position n hides; the mask token
        itself is never predicted (-inf). Rows of visible positions are predictions too; where SUBS wants those tokens
        carried over, see `diffusion.masking.subs_log_probs`.

        Args:
            input_ids: long [batch, length], the text; `config.mask_token_id` at positions that are not known.
            attention_mask: [batch, length], 0 at padding, which may be anywhere and has no effect on other positions;
                positions count the rest (see `config.attend_to_padding`). Or, without blocks, a 4-D mask as in
                transformers.
            labels: long [batch, length], a text to predict; -100 at positions that are given, which stay as they are in
                `input_ids` and are not counted; neither is padding. Gives `loss`: (1) of `diffusion.masking`, estimated
                with one time and one set of masks per row, in nats per label. That is a bound on the negative
                log-likelihood of the labels given the rest, but for the ends of time that the configuration cuts off
                (`least_time` and the schedule's `epsilon`). Masks are drawn here: pass the text itself as `input_ids`.
                No logits then.
                With `config.block_size` there is one time per block, and the loss estimates the sum over blocks of (1)
                for the block given the clean text before it (BD3-LM, eq. 5), again in nats per label.
            sigma: float [batch] or one for all, the noise level -log alpha of `input_ids`, in nats. Models with
                `time_conditioning` need it or `t`; others take neither.
            t: float [batch] or one for all, the time between 0 and 1, from which `config.noise_schedule` makes sigma.
            modulations: what `model.modulations` has made for the noise level, to be used again.
            query_positions: long [batch, queried], the positions to predict, -1 for none. All of them if not given.
            past_key_values: an `MDLMCache`, for models with `config.block_size`. `query_positions` must then lie in one
                block of each row. That block and what is not finished before it are read, later positions are not.
                Blocks before it are finished: keys and values stay in the cache, and those tokens must not change any
                more. The block asked for may be asked again, as it stands then, until a later one is. Logits are those
                of a pass without cache. Other models take an `ApproximateMDLMCache`: tokens that were known in its
                first pass keep the keys and values of that pass, and all else is computed. Logits are then not those of
                a pass without cache. Positions that were known must not be asked for, and nothing may change there.
            use_cache: start an exact cache, if none is passed.
            noised: with `labels`, the text already masked, with the weight of its tokens. Drawn if not given. May be a
                plain tuple of the same fields, as `Trainer` hands on no other.
            generator: with `labels`, source of times and masks; torch's global one if not given.
            output_hidden_states: return the residual stream before the first layer and after every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).

        Raises:
            ValueError: before any computation, for tokens outside the vocabulary, a text longer than
                `max_position_embeddings`, a row of padding only, arguments that do not go together, a noise level that
                is missing, out of range, or of no effect; with a cache, for queries in two blocks of a row or in what
                is finished, and for masks before the block that is asked for.
        """
        if labels is None:
            for name, value in (("noised", noised), ("generator", generator)):
                if value is not None:
                    raise ValueError(f"`{name}` has no effect without `labels`. Leave it out, or pass `labels`.")
            if use_cache and past_key_values is None:
                if self.config.block_size is None:
                    raise ValueError(
                        "`use_cache=True` needs a model with `block_size`: in this one every position reads all "
                        "others, so nothing stays right when a token is drawn. Leave it out; an approximation is "
                        f"`past_key_values=ApproximateMDLMCache({self.config.num_hidden_layers})`."
                    )
                past_key_values = MDLMCache(self.config.num_hidden_layers)
            outputs = self.model(
                input_ids,
                attention_mask,
                sigma,
                t,
                modulations,
                query_positions,
                past_key_values,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            return MaskedDiffusionOutput(
                logits=self._logits(outputs.last_hidden_state),
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
            )

        others = {
            **{"sigma": sigma, "t": t, "modulations": modulations, "query_positions": query_positions},
            **{"past_key_values": past_key_values, "use_cache": use_cache or None},
        }
        for name in [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"`{name}` does not go with `labels`, which draw a noise level for all positions. Leave it out; to "
                "choose the masks and their noise level, pass `noised`."
            )
        labels = read_labels(labels, input_ids, attention_mask, self.config.vocab_size)
        check_no_masks(labels, self.mask_token_id)
        text = torch.where(labels != -100, labels, input_ids)
        if noised is None:
            noised = self._draw_noised_text(text, labels != -100, attention_mask, generator)
        elif generator is not None:
            raise ValueError("`generator` has no effect with `noised`, which holds the masks already. Leave one out.")
        noised = check_noised(noised, text, attention_mask, self.mask_token_id)
        outputs = self.model(
            noised.input_ids,
            attention_mask,
            sigma=noised.sigma if self.config.time_conditioning else None,
            clean_ids=None if self.config.block_size is None else text,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss = chunked_cross_entropy(
            outputs.last_hidden_state,
            labels.masked_fill(noised.input_ids != self.mask_token_id, -100),
            self._logits,
            self.config.vocab_size,
            num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum().clamp(min=1),
            weights=noised.weight.expand(labels.shape),
        )
        return MaskedDiffusionOutput(loss=loss, hidden_states=outputs.hidden_states)

    def _draw_noised_text(
        self,
        text: torch.Tensor,
        maskable: torch.Tensor,
        attention_mask: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> NoisedText:
        block = None
        if self.config.block_size is not None:
            real = attention_mask.to(text.device, torch.bool) if attention_mask is not None else None
            block = places_in_text(text, real) // self.config.block_size
        elif self.config.attend_to_padding and attention_mask is not None:
            maskable = maskable | ~attention_mask.bool()
        schedule, sampling = self.config.make_schedule(), self.config.make_time_sampling()
        return draw_noised_text(text, maskable, schedule, sampling, self.mask_token_id, generator, block)


def _mask_rows(mask: torch.Tensor | None, query_positions: torch.Tensor) -> torch.Tensor | None:
    """The rows of a mask [batch or 1, heads or 1, length, keys] that belong to `query_positions` [batch, queried]."""
    if mask is None:
        return None
    return torch.take_along_dim(mask, query_positions.clamp(min=0)[:, None, :, None], dim=2)


__all__ = ["MDLMForMaskedDiffusion", "MDLMModel"]
