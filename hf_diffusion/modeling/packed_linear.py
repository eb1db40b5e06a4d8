"""Linear layers for decoding on a CPU, with weights in the layout that oneDNN computes in.

A decoding step multiplies every weight with a few rows. `F.linear` then spends more time re-arranging the weight than
on computing; with the weight packed once, a pass costs little more than reading it.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PackedLinear(nn.Linear):
    """An `nn.Linear` that computes from a packed copy of its weight when no gradient is asked for.

    The weight itself stays where it is: saving, tying and training see an ordinary linear layer. The copy takes as much
    memory again; it is made anew when the weight has changed, and is left out of copies of the model.
    """

    _packed: torch.Tensor | None = None
    _packed_from: tuple[int, int] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or input.dtype != self.weight.dtype or not _packable(self.weight):
            return F.linear(input, self.weight, self.bias)
        weight_now = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed_from != weight_now:
            # The hint is the number of rows to expect. Packing for a few rows serves one and many almost as well.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)
            self._packed_from = weight_now
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_packed", "_packed_from")}


def _packable(weight: Any) -> bool:
    # Packing bfloat16 takes instructions that not every CPU has.
    computes = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return weight.device.type == "cpu" and computes


def can_pack(linear: nn.Module) -> bool:
    """Whether this build of PyTorch has the (private) operators, and this layer is one that they serve."""
    return (
        type(linear) in (nn.Linear, PackedLinear)
        and type(linear.weight) is nn.Parameter
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _packable(linear.weight)
    )


def pack_linear_layers(model: nn.Module) -> int:
    """Pack every linear layer of `model` in place, for faster `generate` on a CPU.

    Results change in the last digits only. Layers that cannot be packed (another device or dtype, adapters, quantised
    ones) stay as they are.

    Returns:
        How many layers are packed now.
    """
    packed = 0
    for module in model.modules():
        if can_pack(module):
            module.__class__ = PackedLinear
            packed += 1
    return packed


def unpack_linear_layers(model: nn.Module) -> None:
    """Undo `pack_linear_layers`."""
    for module in model.modules():
        if type(module) is PackedLinear:
            module._packed = module._packed_from = None
            module.__class__ = nn.Linear  # type: ignore[assignment]


__all__ = ["pack_linear_layers", "unpack_linear_layers"]
