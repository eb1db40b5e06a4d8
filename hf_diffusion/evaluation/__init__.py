"""Likelihoods and their bounds, each called what it is; and how good drawn texts are."""

from ..modeling.bound_lomdm import BoundEstimate, estimate_lomdm_bound
from .environment import environment
from .frontier import DrawnTexts, FrontierPoint, draw_texts, judge_drawn, plot_frontier, reference_pieces
from .judge import Judge, JudgedTexts
from .samples import SampleQuality, measure_samples
from .text_likelihood import TextLikelihood, evaluate_text


__all__ = [
    "BoundEstimate",
    "DrawnTexts",
    "FrontierPoint",
    "Judge",
    "JudgedTexts",
    "SampleQuality",
    "TextLikelihood",
    "draw_texts",
    "environment",
    "estimate_lomdm_bound",
    "evaluate_text",
    "judge_drawn",
    "measure_samples",
    "plot_frontier",
    "reference_pieces",
]
