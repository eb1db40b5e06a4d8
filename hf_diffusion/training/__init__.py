"""Training masked-diffusion models with `transformers.Trainer`: orders, their curriculum, averaged weights, curves."""

from .curriculum import CurriculumCallback, OrderCollator, OrderCurriculum
from .curves import LossCurveCallback
from .data import TokenTexts, load_text, train_tokenizer
from .ema import EMACallback


__all__ = [
    "CurriculumCallback",
    "EMACallback",
    "LossCurveCallback",
    "OrderCollator",
    "OrderCurriculum",
    "TokenTexts",
    "load_text",
    "train_tokenizer",
]
