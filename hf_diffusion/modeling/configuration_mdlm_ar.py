"""Configuration of the autoregressive baseline that MDLM is published with (arXiv 2406.07524)."""

from huggingface_hub.dataclasses import strict

from .configuration_published import PublishedConfig


@strict
class MDLMARConfig(PublishedConfig):
    r"""
    See `PublishedConfig` for the other arguments; there is no noise here, and so nothing about it.

    Args:
        use_cache (`bool`, defaults to `True`): keep keys and values, outside training.
    """

    model_type = "mdlm_ar"

    use_cache: bool = True


__all__ = ["MDLMARConfig"]
