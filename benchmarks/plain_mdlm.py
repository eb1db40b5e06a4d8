"""MDLM computed plainly, as its reference implementation goes about it: what `mdlm.py` measures ours against.

Nothing is spared. Every pass runs the embedding of the noise level, which is a constant, and the head at all positions;
SUBS and the draw touch the whole vocabulary at every position and step. Weights are in the published layout.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from hf_diffusion import MDLMConfig
from hf_diffusion.diffusion.masking import NoisedText


IMPOSSIBLE = -1e6
"""Log-probability of what cannot be."""

LAST_TIME = 1e-5
"""Where the steps of the sampler end; what is still masked there is filled with the most likely tokens."""


class PlainEmbedding(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.embedding)


class PlainSigmaMap(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        angles = sigma[:, None] * torch.exp(torch.arange(128, device=sigma.device) * (-math.log(10000) / 128))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PlainBlock(nn.Module):
    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        width, self.num_heads, self.dropout = config.hidden_size, config.num_attention_heads, config.residual_dropout
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(config.conditioning_size, 6 * width)

    def forward(self, states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(conditioning)[:, None].chunk(6, -1)
        attended = self.attention(self.norm1(states) * (1 + scale) + shift)
        states = states + gate * F.dropout(attended, self.dropout, self.training)
        fed = self.mlp(self.norm2(states) * (1 + mlp_scale) + mlp_shift)
        return states + mlp_gate * F.dropout(fed, self.dropout, self.training)

    def attention(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attn_qkv(states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(turn(query), turn(key), value)
        return self.attn_out(attended.transpose(1, 2).flatten(2))


def turn(states: torch.Tensor) -> torch.Tensor:
    """Rotary positions on [batch, heads, length, head_dim]: channel i is turned together with channel i + half."""
    length, half = states.shape[-2], states.shape[-1] // 2
    angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(half) / half))
    first, second = states.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PlainHead(nn.Module):
    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, bias=False)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)

    def forward(self, states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(states) * (1 + scale) + shift)


class PlainMDLM(nn.Module):
    """The network, its loss and its sampler, without time conditioning and with the log-linear schedule."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.mask_token_id = config.mask_token_id
        self.vocab_embed = PlainEmbedding(config.vocab_size, config.hidden_size)
        self.sigma_map = PlainSigmaMap(config.conditioning_size)
        self.blocks = nn.ModuleList([PlainBlock(config) for _ in range(config.num_hidden_layers)])
        self.output_layer = PlainHead(config)

    def load_published(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy weights under their published names, all of them."""
        names = {name: name.removeprefix("backbone.") for name in weights if not name.endswith("inv_freq")}
        self.load_state_dict({ours: weights[name] for name, ours in names.items()})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocab_size]."""
        conditioning = F.silu(self.sigma_map(torch.zeros(input_ids.shape[0], device=input_ids.device)))
        states = self.vocab_embed(input_ids)
        for block in self.blocks:
            states = block(states, conditioning)
        return self.output_layer(states, conditioning)

    def log_probs(self, input_ids: torch.Tensor) -> torch.Tensor:
        """SUBS over all positions and the whole vocabulary, [batch, length, vocab_size] in nats."""
        logits = self(input_ids)
        logits[..., self.mask_token_id] += IMPOSSIBLE
        log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
        rows, columns = (input_ids != self.mask_token_id).nonzero(as_tuple=True)
        log_probs[rows, columns] = IMPOSSIBLE
        log_probs[rows, columns, input_ids[rows, columns]] = 0
        return log_probs

    def loss(self, text: torch.Tensor, noised: NoisedText) -> torch.Tensor:
        """The bound in nats per token of `text` [batch, length]."""
        nll = -self.log_probs(noised.input_ids).gather(-1, text[..., None])[..., 0]
        return (nll * noised.weight).mean()

    @torch.no_grad()
    def probs(self, canvas: torch.Tensor) -> torch.Tensor:
        return self.log_probs(canvas).exp()

    def step(self, canvas: torch.Tensor, probs: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The canvas [batch, length] at time s < t: an exponential race over every token of every position."""
        weights = probs * (t - s)
        weights[..., self.mask_token_id] = s
        arrivals = 1e-10 - torch.log(torch.rand_like(weights) + 1e-10)
        drawn = (weights / arrivals).argmax(dim=-1)
        return torch.where(canvas == self.mask_token_id, drawn, canvas)

    def sample(self, batch_size: int, length: int, num_steps: int) -> "PlainSample":
        """Text from nothing, in steps that keep the probabilities of the last pass until a token has changed."""
        canvas = torch.full((batch_size, length), self.mask_token_id)
        probs, passes = None, 0
        for t in torch.linspace(1, LAST_TIME, num_steps + 1)[:-1]:
            if probs is None:
                probs, passes = self.probs(canvas), passes + 1
            following = self.step(canvas, probs, t, t - (1 - LAST_TIME) / num_steps)
            if not torch.equal(following, canvas):
                probs = None
            canvas = following
        return PlainSample(self.probs(canvas).argmax(dim=-1), passes + 1)


class PlainSample(NamedTuple):
    """
    Attributes:
        sequences: long [batch, length].
        passes: how often the network was run.
    """

    sequences: torch.Tensor
    passes: int
