"""Linear layers for decoding on a CPU, with weights in the layout that oneDNN computes in.

A decoding step multiplies every weight with a few rows. `F.linear` then spends more time re-arranging the weight than
on computing; with the weight packed once, a pass costs little more than reading it.
"""

import torch
from torch import nn
from torch.nn import functional as F


class PackedLinear(nn.Linear):
    """An `nn.Linear` that computes from a packed copy of its weight when no gradient is asked for.

    The weight itself stays where it is: saving, tying and training see an ordinary linear layer. The copy takes as much
    memory again, and does not follow later changes of the weight; pack again after them.
    """

    packed: torch.Tensor

    def pack(self) -> None:
        # The hint is the number of rows to expect. Packing for a few rows serves one and many almost as well.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or input.dtype != self.packed.dtype or input.device.type != "cpu":
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def can_pack(linear: nn.Module) -> bool:
    """Whether this build of PyTorch has the (private) operators, and this layer is one that they serve."""
    return (
        type(linear) in (nn.Linear, PackedLinear)
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
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
            module.pack()  # type: ignore[operator]
            packed += 1
    return packed


def unpack_linear_layers(model: nn.Module) -> None:
    """Undo `pack_linear_layers`."""
    for module in model.modules():
        if type(module) is PackedLinear:
            del module.packed
            module.__class__ = nn.Linear  # type: ignore[assignment]


__all__ = ["pack_linear_layers", "unpack_linear_layers"]
