"""The sizes of a comparison, one table for each kind of machine."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        shapes: of each kind of model, by the names of its recipe's fields. Their numbers of parameters are within 2 %.
        shared: fields of every recipe.
        strided_steps: steps of the strided phase, which comes after `shared["steps"]`.
        max_shuffled: of ARMD's curriculum (rho).
        num_draws: of a bound.
        characters: how much of the validation text, and of the test text, is scored; None for all.
        num_samples: texts drawn for a point of the frontier.
        temperatures, num_streams, denoising_steps: of the frontier. Masked diffusion also takes a step per token.
    """

    shapes: dict[str, dict[str, int]]
    shared: dict[str, Any]
    strided_steps: int
    max_shuffled: int
    num_draws: int
    characters: int | None
    num_samples: int
    temperatures: tuple[float, ...]
    num_streams: tuple[int, ...]
    denoising_steps: tuple[int, ...]


def shape(hidden_size: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    return {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


PRESETS = {
    # Seconds: whether everything runs.
    "smoke": Preset(
        shapes={
            "autoregressive": shape(32, 2, 2),
            "armd": shape(32, 2, 2),
            "mdlm": shape(32, 2, 2, conditioning_size=4),
            "lomdm": shape(24, 2, 2, conditioning_size=4),
        },
        shared={
            "vocab_size": 300,
            "text_length": 16,
            "batch_size": 4,
            "steps": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "evaluate_every": 4,
            "validation_texts": 4,
        },
        strided_steps=4,
        max_shuffled=4,
        num_draws=2,
        characters=400,
        num_samples=4,
        temperatures=(1.0,),
        num_streams=(1, 4),
        denoising_steps=(4,),
    ),
    # Two hours of one core for three seeds.
    "cpu": Preset(
        shapes={
            "autoregressive": shape(96, 3, 6),
            "armd": shape(96, 3, 6),
            "mdlm": shape(84, 3, 6, conditioning_size=40),
            "lomdm": shape(72, 3, 6, conditioning_size=12),
        },
        shared={
            "vocab_size": 512,
            "text_length": 64,
            "batch_size": 16,
            "steps": 3000,
            "learning_rate": 3e-3,
            "warmup_steps": 100,
            "ema_decay": 0.998,
            "evaluate_every": 250,
            "validation_texts": 64,
        },
        strided_steps=600,
        max_shuffled=8,
        num_draws=2,
        characters=400_000,
        num_samples=64,
        temperatures=(0.7, 0.85, 1.0),
        num_streams=(1, 2, 4, 8),
        denoising_steps=(8, 16, 32),
    ),
    # One GPU, and a text of some hundred million characters.
    "gpu": Preset(
        shapes={
            "autoregressive": shape(512, 8, 8),
            "armd": shape(512, 8, 8),
            "mdlm": shape(496, 8, 8, conditioning_size=64),
            "lomdm": shape(448, 8, 8, conditioning_size=48),
        },
        shared={
            "vocab_size": 8192,
            "text_length": 512,
            "batch_size": 64,
            "steps": 20_000,
            "learning_rate": 6e-4,
            "warmup_steps": 500,
            "ema_decay": 0.9995,
            "evaluate_every": 1000,
            "validation_texts": 64,
            "dropout": 0.1,
            "bf16": True,
        },
        strided_steps=4000,
        max_shuffled=32,
        num_draws=8,
        characters=None,
        num_samples=256,
        temperatures=(0.7, 0.8, 0.9, 1.0),
        num_streams=(1, 2, 4, 8),
        denoising_steps=(32, 64, 128, 256),
    ),
}
