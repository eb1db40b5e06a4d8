"""Training masked-diffusion models with `transformers.Trainer`: orders, their curriculum, averaged weights, curves."""

from .curriculum import CurriculumCallback, OrderCollator, OrderCurriculum
from .curves import LossCurveCallback
from .data import TokenTexts, load_text, train_tokenizer
from .diagnostics import DiagnosticTrainer, plot_diagnostics
from .ema import EMACallback


__all__ = [
    "CurriculumCallback",
    "DiagnosticTrainer",
    "EMACallback",
    "LossCurveCallback",
    "OrderCollator",
    "OrderCurriculum",
    "TokenTexts",
    "load_text",
    "plot_diagnostics",
    "train_tokenizer",
]
