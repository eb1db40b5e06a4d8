"""Likelihoods and their bounds, each called what it is."""

from ..modeling.bound_lomdm import BoundEstimate, estimate_lomdm_bound
from .environment import environment
from .text_likelihood import TextLikelihood, evaluate_text


__all__ = ["BoundEstimate", "TextLikelihood", "environment", "estimate_lomdm_bound", "evaluate_text"]
