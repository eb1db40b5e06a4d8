"""Likelihoods and their bounds, each called what it is."""

from .lomdm_bound import BoundEstimate, estimate_lomdm_bound


__all__ = ["BoundEstimate", "estimate_lomdm_bound"]
