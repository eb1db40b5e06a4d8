"""Models that come with the package: small, trained by `hf-diffusion train`, each with its model card."""

from pathlib import Path


ARMD_SHAKESPEARE = str(Path(__file__).parent / "armd-shakespeare")
"""ARMD of 3.7 million parameters on Shakespeare's plays."""
