"""MDLM: a bidirectional transformer that reads a text with masks in it and predicts what they hide (arXiv 2406.07524).

The network is a diffusion transformer (DiT): every layer is shifted, scaled and gated by a function of the noise level.
Most published models are not told the noise level; for them that function is a constant.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from ..diffusion.masking import NoisedText, draw_noised_text
from ..generation.mixin import DiffusionGenerationMixin
from .configuration_mdlm import MDLMConfig
from .initial_std import linear_with_std
from .inputs_mdlm import check_text, read_noise_level
from .layers_mdlm import MDLMLayer, NoiseEmbedding, init_linear, modulate, take_rows
from .loss import chunked_cross_entropy
from .outputs import MaskedDiffusionOutput, QueryModelOutput
from .published_mdlm import register_published_layout


Modulations = tuple[torch.Tensor, ...]
"""Shifts, scales and gates: [batch or 1, 1, 6 * hidden_size] of each layer, [.., 2 * hidden_size] of the final norm."""


class MDLMPreTrainedModel(PreTrainedModel):
    config: MDLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MDLMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # published files hold it; the config says it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: a fresh layer passes its input on, and a fresh model finds all tokens equally likely."""
        if not init_linear(module):
            super()._init_weights(module)

    @property
    def mask_token_id(self) -> int:
        assert self.config.mask_token_id is not None
        return self.config.mask_token_id

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but in our layout; `save_original_format=True` gives the one they were loaded from."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class MDLMModel(MDLMPreTrainedModel):
    """The network without its head: one hidden state per position."""

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
        conditioning = self.noise_embedding(read_noise_level(self.config, sigma, t, self.embed_tokens.weight.device))
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
        output_hidden_states: bool | None = None,
    ) -> QueryModelOutput:
        """See `MDLMForMaskedDiffusion.forward`; returns hidden states in place of logits."""
        conditioning = None
        if modulations is None:
            conditioning = self.noise_embedding(
                read_noise_level(self.config, sigma, t, input_ids.device, input_ids.shape[0])
            )
        elif sigma is not None or t is not None:
            raise ValueError("`modulations` hold the noise level already: leave out `sigma` and `t`.")
        if self.config.attend_to_padding:
            attention_mask = None
        check_text(input_ids, attention_mask, self.config)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)
            input_ids = input_ids.masked_fill(~real, self.mask_token_id)
        hidden_states = self.embed_tokens(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        rotary = self.rotary_emb(hidden_states, positions)

        # Nobody reads the last layer but the head, so rows that are not asked for end there.
        last_mask, last_rows = mask, None
        if query_positions is not None and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)):
            last_mask, last_rows = _mask_rows(mask, query_positions), query_positions
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
            )
            states_of_layers.append(hidden_states)

        def answer(states: torch.Tensor) -> torch.Tensor:
            """The rows that were asked for."""
            return states if query_positions is None else take_rows(states, query_positions)

        earlier, last = states_of_layers[:-1], states_of_layers[-1]
        last = last if last_rows is not None else answer(last)
        shift_scale = modulations[-1] if modulations is not None else self.final_shift_scale(conditioning)[:, None]
        return QueryModelOutput(
            last_hidden_state=modulate(self.norm(last), *shift_scale.chunk(2, dim=-1)),
            hidden_states=(*map(answer, earlier), last) if output_hidden_states else None,
        )


class MDLMForMaskedDiffusion(MDLMPreTrainedModel, DiffusionGenerationMixin):
    """MDLM with its language-model head: what masks hide, and a bound on the likelihood of a text."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.model = MDLMModel(config)
        self.lm_head = linear_with_std(config.hidden_size, config.vocab_size, std=0.0, bias=True)
        self.post_init()

    has_exact_cache = False

    def default_strategy(self, max_denoising_steps: int | None, in_block: bool) -> str:
        return "first_hitting" if max_denoising_steps is None else "ancestral"

    def mask_levels(self, num_steps: int) -> torch.Tensor:
        schedule, t = self.config.make_schedule(), torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        levels = schedule.mask_probability(t) / schedule.mask_probability(t[0])
        levels[-1] = 0.0  # some schedules mask tokens at time 0 already; the last step reveals them too
        return levels

    def inputs_of_all_passes(self) -> dict[str, Any]:
        return {} if self.config.time_conditioning else {"modulations": self.model.modulations()}

    def inputs_at_level(self, level: torch.Tensor) -> dict[str, Any]:
        if not self.config.time_conditioning:
            return {}
        schedule = self.config.make_schedule()
        most = schedule.mask_probability(torch.ones((), dtype=torch.float64, device=level.device))
        return {"t": schedule.time_at_mask_probability(level * most).clamp(0, 1)}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sigma: torch.Tensor | float | None = None,
        t: torch.Tensor | float | None = None,
        modulations: Modulations | None = None,
        query_positions: torch.Tensor | None = None,
        noised: NoisedText | tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedDiffusionOutput:
        r"""
        Row n of the logits predicts token n from all visible tokens. Their softmax is the law of the token that a mask
        at position n hides; the mask token itself is never predicted (-inf). Rows of visible positions are predictions
        too; where SUBS wants those tokens carried over, see `diffusion.masking.subs_log_probs`.

        Args:
            input_ids: long [batch, length], the text; `config.mask_token_id` at positions that are not known.
            attention_mask: [batch, length], 0 at padding, which may be anywhere and has no effect on other positions;
                positions count the rest (see `config.attend_to_padding`). Or a 4-D mask as in transformers.
            labels: long [batch, length], a text to predict; -100 at positions that are given, which stay as they are in
                `input_ids` and are not counted. Gives `loss`: (1) of `diffusion.masking`, estimated with one time and
                one set of masks per row, in nats per label. That is a bound on the negative log-likelihood of the
                labels given the rest, but for the ends of time that the configuration cuts off (`least_time` and the
                schedule's `epsilon`). Masks are drawn here: pass the text itself as `input_ids`. No logits then.
            sigma: float [batch] or one for all, the noise level -log alpha of `input_ids`, in nats. Models with
                `time_conditioning` need it or `t`; others take neither.
            t: float [batch] or one for all, the time between 0 and 1, from which `config.noise_schedule` makes sigma.
            modulations: what `model.modulations` has made for the noise level, to be used again.
            query_positions: long [batch, queried], the positions to predict, -1 for none. All of them if not given.
            noised: with `labels`, the text already masked, with the weight of its tokens. Drawn if not given. May be a
                plain tuple of the same fields, as `Trainer` hands on no other.
            generator: with `labels`, source of times and masks; torch's global one if not given.
            output_hidden_states: return the residual stream before the first layer and after every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).

        Raises:
            ValueError: before any computation, for tokens outside the vocabulary, a text longer than
                `max_position_embeddings`, a row of padding only, arguments that do not go together, and a noise level
                that is missing, out of range, or of no effect.
        """
        if labels is None:
            for name, value in (("noised", noised), ("generator", generator)):
                if value is not None:
                    raise ValueError(f"`{name}` has no effect without `labels`. Leave it out, or pass `labels`.")
            outputs = self.model(
                input_ids,
                attention_mask,
                sigma,
                t,
                modulations,
                query_positions,
                output_hidden_states,
                return_dict=True,
            )
            return MaskedDiffusionOutput(
                logits=self._logits(outputs.last_hidden_state), hidden_states=outputs.hidden_states
            )

        others = {"sigma": sigma, "t": t, "modulations": modulations, "query_positions": query_positions}
        for name in [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"`{name}` does not go with `labels`, which draw a noise level for all positions. Leave it out; to "
                "choose the masks and their noise level, pass `noised`."
            )
        self._check_labels(input_ids, labels, attention_mask)
        if noised is None:
            noised = self._draw_noised_text(input_ids, attention_mask, labels, generator)
        noised = NoisedText(*noised)
        outputs = self.model(
            noised.input_ids,
            attention_mask,
            sigma=noised.sigma if self.config.time_conditioning else None,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss = chunked_cross_entropy(
            outputs.last_hidden_state,
            labels.masked_fill(noised.input_ids != self.mask_token_id, -100),
            self._logits,
            self.config.vocab_size,
            num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum().clamp(min=1),
            weights=noised.weight[:, None].expand(labels.shape),
        )
        return MaskedDiffusionOutput(loss=loss, hidden_states=outputs.hidden_states)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        # Behind the back of autograd, which would copy all gradients for it; a softmax gives this column none.
        logits.detach()[..., self.mask_token_id] = -torch.inf
        return logits

    def _draw_noised_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        generator: torch.Generator | None,
    ) -> NoisedText:
        maskable = labels != -100
        text = torch.where(maskable, labels, input_ids)
        if self.config.attend_to_padding and attention_mask is not None:
            maskable = maskable | ~attention_mask.bool()
        schedule, sampling = self.config.make_schedule(), self.config.make_time_sampling()
        return draw_noised_text(text, maskable, schedule, sampling, self.mask_token_id, generator)

    def _check_labels(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(labels.shape)}. "
                "Row n predicts token n: nothing is shifted."
            )
        if torch.compiler.is_compiling():
            return
        labelled = labels != -100
        if bool((labelled & ((labels < 0) | (labels >= self.config.vocab_size))).any()):
            raise ValueError(
                f"`labels` must lie in the vocabulary (0 to {self.config.vocab_size - 1}) or be -100, got "
                f"{int(labels.min())} to {int(labels.max())}."
            )
        if bool((labels == self.mask_token_id).any()):
            raise ValueError(
                f"`labels` hold the mask token ({self.mask_token_id}), which is never predicted. Put -100 at positions "
                "without a token to predict."
            )
        if attention_mask is not None and attention_mask.ndim == 2 and bool((labelled & (attention_mask == 0)).any()):
            raise ValueError("`labels` name tokens where `attention_mask` is 0. Put -100 at padding.")


def _mask_rows(mask: torch.Tensor | None, query_positions: torch.Tensor) -> torch.Tensor | None:
    """The rows of a mask [batch or 1, heads or 1, length, keys] that belong to `query_positions` [batch, queried]."""
    if mask is None:
        return None
    _, heads, _, keys = mask.shape
    index = query_positions.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, keys)
    return mask.expand(query_positions.shape[0], -1, -1, -1).gather(2, index)


register_published_layout(MDLMConfig.model_type)

__all__ = ["MDLMForMaskedDiffusion", "MDLMModel", "MDLMPreTrainedModel"]
