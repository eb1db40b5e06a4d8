"""Ancestral sampling in continuous time (arXiv 2409.02908): no grid, one position per pass, in random order.

The time at which a position is revealed is drawn for each one by itself, so the order is uniform, and the noise level
of a pass is the one at which its position is revealed.
"""

from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Filling, Strategy
from .planned import PlannedFilling


def begin(config: DiffusionGenerationConfig, canvas: Canvas) -> Filling:
    level = canvas.uniforms[:, 1]
    return PlannedFilling(canvas, keys=-level, level=level)


FIRST_HITTING = Strategy("first_hitting", begin, num_planes=lambda config: 2)
