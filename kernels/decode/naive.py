"""Specification of the fused decode linear, in plain torch and float32."""

from __future__ import annotations

from torch import Tensor

from adaptc.kernels.resident import Resident, unpack
from adaptc.kernels.weight import Weight, unpack_weight


def linear(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None,
    scale: float,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain * (x w0^T + scale * ((x Sq^T) C) Sp^T) + bias, x (M, n) of any float dtype; rounds once, at the end."""
    wide = x.float()
    y = wide @ unpack_weight(weight).t()
    if adapter is not None:
        p, core, q = unpack(adapter)  # (m, tp), (tp, tq), (tq, n)
        y = y + scale * (((wide @ q.t()) @ core.t()) @ p.t())
    if gain is not None:
        y = y * gain.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
