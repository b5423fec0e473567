"""Specification of DoRA's two steps (Liu et al., arXiv 2402.09353): the row norms and the composed output."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.kernels.resident import Resident, unpack
from adaptc.kernels.weight import Weight, unpack_weight

ROWS = 512


def row_squares(weight: Weight) -> Tensor:
    """Squared norms (m,) of the rows of w0 in float32, a block of rows at a time."""
    m, n = weight.shape
    parts = []
    for start in range(0, m, ROWS):
        scales = None if weight.scales is None else weight.scales[start : start + ROWS]
        data = weight.data[start : start + ROWS]
        block = unpack_weight(Weight(weight.code, data, scales, (data.shape[0], n)))
        parts.append(block.square().sum(1))
    return torch.cat(parts) if parts else torch.empty(0, device=weight.data.device)


def row_norms(weight: Weight, adapter: Resident, scale: float) -> Tensor:
    """||w0 + scale * dW|| by rows (m,), float32, from the dense sum: what the factored form must equal."""
    p, core, q = unpack(adapter)
    merged: Tensor = unpack_weight(weight) + scale * (p @ core @ q)
    return merged.square().sum(1).sqrt()


def compose(base: Tensor, delta: Tensor, gain: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """gain * (base - bias + scale * delta) + bias in float32, rounded once; base (M, m) already holds the bias."""
    offset = torch.zeros_like(gain, dtype=torch.float32) if bias is None else bias.float()
    return (gain.float() * (base.float() - offset + scale * delta.float()) + offset).to(base.dtype)
