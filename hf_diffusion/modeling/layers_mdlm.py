"""The parts of MDLM: the embedding of the noise level, attention, feed-forward and the layer that joins them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_mdlm import MDLMConfig
from .initial_std import init_with_own_std, linear_with_std


NUM_SINUSOIDS = 256
"""Width of the sinusoidal code of the noise level."""


class NoiseEmbedding(nn.Module):
    """The noise level as a vector: sinusoids of sigma, cosines first, and two linear maps."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(NUM_SINUSOIDS, config.conditioning_size)
        self.out_proj = nn.Linear(config.conditioning_size, config.conditioning_size)

    def forward(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Maps sigma [batch] in nats to [batch, conditioning_size] of `dtype`; the weights may be of a wider one."""
        half = NUM_SINUSOIDS // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
        code = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.in_proj.bias.dtype)  # quantisation spares it
        # In full precision also under autocast, as published: an error here shifts the whole network.
        with torch.autocast(sigma.device.type, enabled=False):
            return F.silu(self.out_proj(F.silu(self.in_proj(code)))).to(dtype)


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
        asking_rows: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        asking, query_rotary = hidden_states, rotary
        if asking_rows is not None:
            asking = take_rows(hidden_states, asking_rows)
            query_rotary = (take_rows(rotary[0], asking_rows), take_rows(rotary[1], asking_rows))
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, asking),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        if asking_rows is None:
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


class PreNormLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: Any, layer_idx: int, is_causal: bool = False) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = MDLMAttention(config, layer_idx, is_causal)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = MDLMMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Any = None,
    ) -> torch.Tensor:
        attended = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, rotary, past_key_values=past_key_values
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class MDLMLayer(PreNormLayer):
    """A pre-norm layer whose norms are shifted and scaled, and whose outputs are gated, by `modulation`."""

    def __init__(self, config: MDLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.modulation = linear_with_std(config.conditioning_size, 6 * config.hidden_size, std=0.0, bias=True)

    def forward(  # type: ignore[override]  # the noise level comes in
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        conditioning: torch.Tensor | None,
        modulation: torch.Tensor | None = None,
        asking_rows: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """
        Args:
            conditioning: [batch or 1, conditioning_size], from which the modulation is made if it is not given.
            asking_rows: long [batch or 1, asking], the rows that go on; all of them if not given.
        """
        if modulation is None:
            modulation = self.modulation(conditioning)[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        normed = modulate(self.input_layernorm(hidden_states), shift, scale)
        attended = self.self_attn(normed, attention_mask, rotary, asking_rows, past_key_values)
        if asking_rows is not None:
            hidden_states = take_rows(hidden_states, asking_rows)
        hidden_states = hidden_states + gate * self.dropout(attended)
        normed = modulate(self.post_attention_layernorm(hidden_states), mlp_shift, mlp_scale)
        return hidden_states + mlp_gate * self.dropout(self.mlp(normed))


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return normed * (1 + scale) + shift


def take_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [batch or 1, length, width] at `index` [batch or 1, n]; negative indices take row 0."""
    return torch.take_along_dim(states, index.clamp(min=0)[..., None], dim=1)


def init_linear(module: nn.Module) -> bool:
    """Initialise linear maps and embeddings as published, uniformly or at zero. False if `module` is neither."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    if not init_with_own_std(module):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if isinstance(module, nn.Linear) and module.bias is not None:
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
    return True
