"""Linear layers whose weight is held in 4 bits, for running a model where it does not fit or would be too slow."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from adaptc.errors import UnsupportedError, UsageError
from adaptc.kernels.linear import linear
from adaptc.kernels.weight import Code, Weight, pack_weight


class PackedLinear(nn.Module):
    """y = x w0^T + bias with w0 (out, in) in 4-bit codes, `nf4` or `int4`, one scale for 64 columns of a row."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        if weight.scales is None:
            raise UnsupportedError("a packed layer holds nf4 or int4 codes, not plain floats")
        self.out_features, self.in_features = weight.shape
        self.code: Code = weight.code
        self.data: Tensor
        self.scales: Tensor
        self.register_buffer("data", weight.data)
        self.register_buffer("scales", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Weight:
        """The weight as the kernels read it."""
        return Weight(self.code, self.data, self.scales.float(), (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """Return x w0^T + bias in the dtype of x (..., in)."""
        return linear(input, self.packed, bias=self.bias)

    def extra_repr(self) -> str:
        """Name sizes and code."""
        return f"in_features={self.in_features}, out_features={self.out_features}, code={self.code}"


def pack_linears(model: nn.Module, code: Code = "nf4", keep: Collection[str] = ("lm_head",)) -> int:
    """Replace every nn.Linear of `model` by a `PackedLinear`, in place; return how many there were.

    Round to nearest, no calibration. Layers whose name ends in one of `keep` stay as they are. Raises UsageError where
    none is left to pack.
    """
    count = 0
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.Linear and child_name not in keep and f"{name}.{child_name}" not in keep:
                with torch.no_grad():
                    weight = pack_weight(child.weight.detach(), code)
                setattr(module, child_name, PackedLinear(weight, child.bias))
                count += 1
    if count == 0:
        raise UsageError("the model has no linear layers to pack")
    return count
