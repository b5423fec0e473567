"""Specification of the fused decode linear, in plain torch and float32."""

from __future__ import annotations

from torch import Tensor

from adaptc.kernels.resident import Resident, unpack
from adaptc.kernels.weight import Weight, unpack_weight


def linear(x: Tensor, weight: Weight, adapter: Resident | None, scale: float, bias: Tensor | None) -> Tensor:
    """y = x w0^T + bias + scale * ((x Sq^T) C) Sp^T, x (M, n) of any float dtype; rounds once, at the end."""
    wide = x.float()
    y = wide @ unpack_weight(weight).t()
    if bias is not None:
        y = y + bias.float()
    if adapter is not None:
        p, core, q = unpack(adapter)  # (m, tp), (tp, tq), (tq, n)
        y = y + scale * (((wide @ q.t()) @ core.t()) @ p.t())
    return y.to(x.dtype)
