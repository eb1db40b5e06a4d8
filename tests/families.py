"""The model families, each as a tiny model. A new family joins the shared suite with one line in `FAMILIES`."""

from dataclasses import dataclass, field

import torch

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion


@dataclass(frozen=True)
class Family:
    config_class: type
    model_class: type
    settings: dict = field(default_factory=dict)
    strategies: tuple[dict, ...] = ()

    def config(self, **overrides):
        # Large weights: a tiny network at the usual scale is so close to uniform that errors would not show.
        shared = {
            "vocab_size": 23,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        return self.config_class(**{**shared, **self.settings, **overrides})

    def model(self, dtype=torch.float32, **overrides):
        torch.manual_seed(1)
        return self.model_class(self.config(**overrides)).to(dtype).eval()


ARMD_STRATEGIES = (
    {"strategy": "autoregressive"},
    {"strategy": "strided", "num_streams": 3},
    {"strategy": "semi_autoregressive", "block_length": 4, "max_denoising_steps": 2},
)

FAMILIES = {
    "armd": Family(ARMDConfig, ARMDForMaskedDiffusion, {"prefix_encoding_size": 16}, ARMD_STRATEGIES),
    "armd_left_neighbour": Family(
        ARMDConfig, ARMDForMaskedDiffusion, {"prefix_encoding_size": 16, "left_neighbour": True}, ARMD_STRATEGIES
    ),
}
