"""Configuration of the autoregressive baseline that MDLM is published with (arXiv 2406.07524)."""

from .configuration_checks import checked
from .configuration_published import PublishedConfig


@checked
class MDLMARConfig(PublishedConfig):
    r"""
    See `PublishedConfig` for the other arguments; there is no noise here, and so nothing about it.

    Args:
        use_cache (`bool`, defaults to `True`): keep keys and values, outside training.
    """

    model_type = "mdlm_ar"

    use_cache: bool = True


__all__ = ["MDLMARConfig"]
