"""Folders that load without this package: the code of a model in flat files, its card, and the way to the Hub."""

from .model_card import Evaluation, ModelCardFacts


__all__ = ["Evaluation", "ModelCardFacts"]
