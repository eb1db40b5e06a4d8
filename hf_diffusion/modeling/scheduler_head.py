"""The head that says how early each position is revealed: one transformer layer and an MLP (LoMDM, figure 3)."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .initial_std import linear_with_std
from .layers_mdlm import PreNormLayer


class SchedulerHead(nn.Module):
    """Maps the hidden states of a text to one exponent per position.

    The last layer starts at zero, so that all exponents of a fresh head are `c1`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c1, self.c2 = config.c1, config.c2
        self.layer = PreNormLayer(config, layer_idx=0)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.out_proj = linear_with_std(config.hidden_size, 1, std=0.0, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [batch, length, hidden_size]; no gradient flows back into them (section 4.2).
            real: bool [batch, length], False at padding, which does not count in the mean; None for no padding.

        Returns:
            Exponents [batch, length], greater than 0, in float32 or wider; `c1` on average over a text (eq. 4).
        """
        hidden_states = hidden_states.detach()
        if self.layer.gradient_checkpointing:
            # It asks for a gradient that nobody reads, as reentrant checkpointing has none for the layer otherwise.
            hidden_states.requires_grad_(torch.is_grad_enabled())
        states = self.layer(hidden_states, attention_mask, rotary)
        scores = self.out_proj(self.act_fn(self.in_proj(self.norm(states))))[..., 0]
        # In full precision also under autocast: small differences of exponents are large ones of small times.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).sigmoid()
        if real is None:
            mean = scores.mean(dim=1, keepdim=True)
        else:
            mean = (scores * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        return self.c1 + self.c2 * (scores - mean)
