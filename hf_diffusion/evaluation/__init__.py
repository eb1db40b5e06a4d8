"""Likelihoods and their bounds, each called what it is."""

from ..modeling.bound_lomdm import BoundEstimate, estimate_lomdm_bound


__all__ = ["BoundEstimate", "estimate_lomdm_bound"]
