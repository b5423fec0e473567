"""Specification of the transform and of the spectral product."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.kernels.sparse import naive as sparse


def transform(x: Tensor, had: Tensor, length: int) -> Tensor:
    """U x row by row, float32: U = I (x) (had (x) Sylvester(length)) / sqrt(order * length), x (M, n)."""
    order = had.shape[0]
    v = x.float().reshape(-1, order, length)
    step = 1
    while step < length:
        pair = v.reshape(-1, order, length // (2 * step), 2, step)
        v = torch.stack((pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]), dim=-2)
        v = v.reshape(-1, order, length)
        step *= 2
    mixed: Tensor = torch.einsum("ok,bkl->bol", had.float(), v)
    norm = float(order * length) ** -0.5
    return mixed.mul(norm).reshape(x.shape)


def spectral(
    x: Tensor, had: Tensor, length: int, starts: Tensor, columns: Tensor, values: Tensor, y: Tensor, scale: float
) -> Tensor:
    """y + scale * F (U x), F (m, n) sparse by rows."""
    return sparse.side(transform(x, had, length), starts, columns, values, y.float(), scale).to(y.dtype)
