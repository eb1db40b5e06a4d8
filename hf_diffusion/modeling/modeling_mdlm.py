"""MDLM: a bidirectional transformer that reads a text with masks in it and predicts what they hide (arXiv 2406.07524).

The network is a diffusion transformer (DiT): every layer is shifted, scaled and gated by a function of the noise level.
Most published models are not told the noise level; for them that function is a constant.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from ..diffusion.masking import NoisedText, draw_noised_text
from ..generation.mixin import DiffusionGenerationMixin
from .configuration_mdlm import MDLMConfig
from .loss import chunked_cross_entropy
from .outputs import MaskedDiffusionOutput, QueryModelOutput
from .published_mdlm import register_published_layout


NUM_SINUSOIDS = 256
"""Width of the sinusoidal code of the noise level."""

Modulations = tuple[torch.Tensor, ...]
"""Shifts, scales and gates of every layer [batch or 1, 1, 6 * hidden_size] and of the final norm [.., 2 * hidden_size]."""


class NoiseEmbedding(nn.Module):
    """The noise level as a vector: sinusoids of sigma, cosines first, and two linear maps."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(NUM_SINUSOIDS, config.conditioning_size)
        self.out_proj = nn.Linear(config.conditioning_size, config.conditioning_size)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        """Maps sigma [batch] in nats to [batch, conditioning_size]."""
        half = NUM_SINUSOIDS // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
        code = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.in_proj.weight.dtype)
        return F.silu(self.out_proj(F.silu(self.in_proj(code))))


class MDLMAttention(nn.Module):
    """Multi-head attention with rotary positions; `is_causal` in the autoregressive baseline only."""

    def __init__(self, config: Any, layer_idx: int, is_causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = is_causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        query_positions: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        asking, query_rotary = hidden_states, rotary
        if query_positions is not None:
            asking = take_rows(hidden_states, query_positions)
            query_rotary = (take_rows(rotary[0], query_positions), take_rows(rotary[1], query_positions))
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, asking),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        if query_positions is None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        else:
            query, _ = apply_rotary_pos_emb(query, query, *query_rotary)
            key, _ = apply_rotary_pos_emb(key, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        return self.o_proj(output.flatten(2))


class MDLMMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MDLMLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer whose norms are shifted and scaled, and whose outputs are gated, by `modulation`."""

    def __init__(self, config: MDLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = MDLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = MDLMMLP(config)
        self.modulation = nn.Linear(config.conditioning_size, 6 * config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        conditioning: torch.Tensor | None,
        modulation: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            conditioning: [batch or 1, conditioning_size], from which the modulation is made if it is not given.
            query_positions: long [batch, queried], the rows that go on; all of them if not given.
        """
        if modulation is None:
            modulation = self.modulation(conditioning)[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        normed = modulate(self.input_layernorm(hidden_states), shift, scale)
        attended = self.self_attn(normed, attention_mask, rotary, query_positions)
        if query_positions is not None:
            hidden_states = take_rows(hidden_states, query_positions)
        hidden_states = hidden_states + gate * self.dropout(attended)
        normed = modulate(self.post_attention_layernorm(hidden_states), mlp_shift, mlp_scale)
        return hidden_states + mlp_gate * self.dropout(self.mlp(normed))


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
        if isinstance(module, MDLMLayer):
            init_zero(module.modulation)
        elif isinstance(module, MDLMModel):
            init_zero(module.final_modulation)
        elif isinstance(module, MDLMForMaskedDiffusion):
            init_zero(module.lm_head)
        elif not init_as_torch(module):
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but in our layout; `save_original_format=True` gives the one the weights were loaded from."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class MDLMModel(MDLMPreTrainedModel):
    """The network without its head: one hidden state per position."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.noise_embedding = NoiseEmbedding(config)
        self.layers = nn.ModuleList([MDLMLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.final_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)
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
        conditioning = self.noise_embedding(self._noise_level(sigma, t))
        modules = [*(layer.modulation for layer in self.layers), self.final_modulation]
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
            conditioning = self.noise_embedding(self._noise_level(sigma, t, input_ids.shape[0]))
        elif sigma is not None or t is not None:
            raise ValueError("`modulations` hold the noise level already: leave out `sigma` and `t`.")
        if self.config.attend_to_padding:
            attention_mask = None
        check_text(input_ids, attention_mask, self.config)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)
            input_ids = input_ids.masked_fill(~real, self.config.mask_token_id)
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
        shift_scale = modulations[-1] if modulations is not None else self.final_modulation(conditioning)[:, None]
        return QueryModelOutput(
            last_hidden_state=modulate(self.norm(last), *shift_scale.chunk(2, dim=-1)),
            hidden_states=(*map(answer, earlier), last) if output_hidden_states else None,
        )

    def _noise_level(
        self, sigma: torch.Tensor | float | None, t: torch.Tensor | float | None, batch_size: int | None = None
    ) -> torch.Tensor:
        """What the network is told: sigma [batch] or [1], in nats."""
        device = self.embed_tokens.weight.device
        given = {name: value for name, value in (("sigma", sigma), ("t", t)) if value is not None}
        if not self.config.time_conditioning:
            for name, value in given.items():
                raise ValueError(
                    f"`{name}`={value} has no effect: this model is not told the noise level "
                    "(`config.time_conditioning` is False). Leave it out."
                )
            return torch.zeros(1, device=device)
        if len(given) != 1:
            raise ValueError(
                f"A model with `time_conditioning` needs either `sigma` (the noise level -log alpha, in nats) or `t` "
                f"(the time between 0 and 1, which `config.noise_schedule` makes a noise level of); got "
                f"{'both' if given else 'neither'}."
            )
        ((name, value),) = given.items()
        level = torch.as_tensor(value, device=device, dtype=torch.get_default_dtype()).reshape(-1)
        if batch_size is not None and level.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`{name}` must be one number or one for each of the {batch_size} rows of `input_ids`, got shape "
                f"{tuple(torch.as_tensor(value).shape)}."
            )
        if not torch.compiler.is_compiling():
            most = 1.0 if name == "t" else math.inf
            if not bool(((level >= 0) & (level <= most) & level.isfinite()).all()):
                remedy = (
                    "a time runs from 0 to 1" if name == "t" else "a noise level is -log alpha, finite and not negative"
                )
                raise ValueError(f"`{name}` must be a valid {name}, got {level.tolist()}: {remedy}.")
        return self.config.make_schedule().sigma(level) if name == "t" else level


class MDLMForMaskedDiffusion(MDLMPreTrainedModel, DiffusionGenerationMixin):
    """MDLM with its language-model head: predictions for masked positions, and the bound on the likelihood of a text."""

    accepts_loss_kwargs = True

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.model = MDLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

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
        noised: NoisedText | None = None,
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
                `input_ids` and are not counted. Gives `loss`: (1) of `diffusion.masking`, estimated with one time and one
                set of masks per row, in nats per label: a bound on the negative log-likelihood of the labels given the
                rest, up to the ends of the time range that the configuration cuts off. Masks are drawn here: pass the
                text itself as `input_ids`.
            sigma: float [batch] or one for all, the noise level -log alpha of `input_ids`, in nats. Models with
                `time_conditioning` need it or `t`; others take neither.
            t: float [batch] or one for all, the time between 0 and 1, from which `config.noise_schedule` makes sigma.
            modulations: what `model.modulations` has made for the noise level, to be used again.
            query_positions: long [batch, queried], the positions to predict, -1 for none. All of them if not given.
            noised: with `labels`, the text already masked, with the weight of its tokens. Drawn if not given.
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
                input_ids, attention_mask, sigma, t, modulations, query_positions, output_hidden_states
            )
            return MaskedDiffusionOutput(
                logits=self._logits(outputs.last_hidden_state), hidden_states=outputs.hidden_states
            )

        others = {"sigma": sigma, "t": t, "modulations": modulations, "query_positions": query_positions}
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` does not go with `labels`, which draw a noise level for all positions. Leave it out; to "
                    "choose the masks and their noise level, pass `noised`."
                )
        self._check_labels(input_ids, labels)
        if noised is None:
            noised = self._draw_noised_text(input_ids, attention_mask, labels, generator)
        outputs = self.model(
            noised.input_ids,
            attention_mask,
            sigma=noised.sigma if self.config.time_conditioning else None,
            output_hidden_states=output_hidden_states,
        )
        loss = chunked_cross_entropy(
            outputs.last_hidden_state,
            labels.masked_fill(noised.input_ids != self.config.mask_token_id, -100),
            self._logits,
            self.config.vocab_size,
            num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum().clamp(min=1),
            weights=noised.weight[:, None].expand(labels.shape),
        )
        return MaskedDiffusionOutput(loss=loss, hidden_states=outputs.hidden_states)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        logits[..., self.config.mask_token_id] = -torch.inf
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
        return draw_noised_text(text, maskable, schedule, sampling, self.config.mask_token_id, generator)

    def _check_labels(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(labels.shape)}. "
                "Row n predicts token n: nothing is shifted."
            )
        if not torch.compiler.is_compiling() and bool((labels == self.config.mask_token_id).any()):
            raise ValueError(
                f"`labels` hold the mask token ({self.config.mask_token_id}), which is never predicted. Put -100 at "
                "positions without a token to predict."
            )


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return normed * (1 + scale) + shift


def take_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [batch or 1, length, width] at `index` [batch, n]; negative indices take row 0."""
    states = states.expand(index.shape[0], -1, -1)
    return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))


def check_text(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: Any) -> None:
    """Raise ValueError for a text that the network cannot read. Looks at values, so not while compiling."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` must be an integer tensor [batch, length], got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    real = None
    if attention_mask is not None and attention_mask.ndim == 2:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids` {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
    if torch.compiler.is_compiling() or input_ids.numel() == 0:
        return
    longest = int(real.sum(dim=1).max()) if real is not None else input_ids.shape[1]
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"`input_ids` hold a text of {longest} tokens, more than the model's context (`max_position_embeddings`="
            f"{config.max_position_embeddings}). Cut it, or raise the limit in the configuration."
        )
    if real is not None and not bool(real.any(dim=1).all()):
        raise ValueError("`attention_mask` leaves nothing of at least one row. Leave out rows of padding only.")
    outside = (input_ids < 0) | (input_ids >= config.vocab_size)
    if real is not None:
        outside &= real
    if bool(outside.any()):
        raise ValueError(
            f"`input_ids` must lie in the vocabulary (0 to {config.vocab_size - 1}), got "
            f"{sorted(set(input_ids[outside].tolist()))[:8]}. The mask token is {config.mask_token_id}."
        )


def init_as_torch(module: nn.Module) -> bool:
    """Initialise linear maps and embeddings uniformly, as torch does. False if `module` is neither."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if isinstance(module, nn.Linear) and module.bias is not None:
        bound = module.in_features**-0.5
        init.uniform_(module.bias, -bound, bound)
    return True


def init_zero(module: nn.Linear) -> None:
    init.zeros_(module.weight)
    init.zeros_(module.bias)


def _mask_rows(mask: torch.Tensor | None, query_positions: torch.Tensor) -> torch.Tensor | None:
    """The rows of a mask [batch or 1, heads or 1, length, keys] that belong to `query_positions` [batch, queried]."""
    if mask is None:
        return None
    batch, heads, _, keys = mask.shape
    index = query_positions.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, keys)
    return mask.expand(query_positions.shape[0], -1, -1, -1).gather(2, index)


register_published_layout(MDLMConfig.model_type)

__all__ = ["MDLMForMaskedDiffusion", "MDLMModel", "MDLMPreTrainedModel"]
