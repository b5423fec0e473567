"""Specification of the sparse ops: entries of a weight replaced, added or restored, and the product beside the base."""

from __future__ import annotations

import torch
from torch import Tensor


def overwrite(w: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """w[index] = values in place, flat positions; return what stood there. `overwrite(w, index, that)` restores."""
    flat = w.view(-1)
    saved = flat[index.long()]
    flat[index.long()] = values.to(w.dtype)
    return saved


def shift(w: Tensor, index: Tensor, delta: Tensor, scale: float) -> Tensor:
    """w[index] += scale * delta in place, rounded once from float32; return what stood there, for `overwrite`."""
    return overwrite(w, index, w.view(-1)[index.long()].float() + scale * delta.float())


def side(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, y: Tensor, scale: float) -> Tensor:
    """y + scale * x S^T, S (m, n) sparse by rows."""
    dense = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    count = (starts[1:] - starts[:-1]).long()
    dense[torch.repeat_interleave(torch.arange(len(count), device=x.device), count), columns.long()] = values.float()
    return (y.float() + scale * (x.float() @ dense.t())).to(y.dtype)
