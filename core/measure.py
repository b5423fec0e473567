"""Exact distances between deltas, computed from their factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Delta, NeedsBase, Sparse
from adaptc.errors import FormatError
from adaptc.factor import decoded
from adaptc.lowrank import low_rank
from adaptc.spectral import Spectral

# Below this share of ||dW||^2 the Gram form of ||x - y||^2 has lost its digits to cancellation; QR keeps them.
_CANCELLED = 1e-9


def norm2(delta: Delta) -> float:
    """Return ||dW||_F^2 in float64; for a base-dependent delta that of its inner part (0 if it has none)."""
    return distance2(delta, None)


def distance2(x: Delta, y: Delta | None) -> float:
    """Return ||dW_x - dW_y||_F^2 in float64 without forming either where both have factors; None counts as zero.

    With B = [B_x, -B_y] and A = [A_x; A_y] it is sum((B^T B) o (A A^T)); where that cancels, ||R_B R_A^T||^2 from the
    two QR factors. Base-dependent deltas are compared by their inner part. Raises FormatError when shapes differ.
    """
    dx, dy = _free(x), _free(y)
    if dx is None or dy is None:
        some = dx if dx is not None else dy
        return 0.0 if some is None else _norm2(some)
    if math.prod(dx.shape) != math.prod(dy.shape) or dx.shape[0] != dy.shape[0]:
        raise FormatError(f"deltas have shapes {dx.shape} and {dy.shape}")
    lx, ly = low_rank(dx), low_rank(dy)
    if isinstance(dx, Sparse | Spectral) and isinstance(dy, Sparse | Spectral) and _basis(dx) == _basis(dy):
        return _sparse_distance2(dx, dy)
    if lx is None or ly is None:
        return float((dx.dense().reshape(-1) - dy.dense().reshape(-1)).square().sum())
    (bx, ax), (by, ay) = lx.factors(), ly.factors()
    return _product_norm2(torch.cat([bx, -by], -1), torch.cat([ax, ay], -2), _norm2(dx))


def relative_error(before: Delta, after: Delta) -> float:
    """Return ||dW - dW'||_F / ||dW||_F, 0 when both are zero, inf when only the first is."""
    total, left = norm2(before), distance2(before, after)
    if total == 0.0:
        return 0.0 if left == 0.0 else math.inf
    return math.sqrt(left / total)


def _free(delta: Delta | None) -> BaseFree | None:
    return delta.inner if isinstance(delta, NeedsBase) else delta


def _norm2(delta: BaseFree) -> float:
    if isinstance(delta, Sparse | Spectral):
        return float((delta.values.double() * delta.scale).square().sum())
    factors = low_rank(delta)
    if factors is None:
        return float(delta.dense().square().sum())
    return _product_norm2(*factors.factors(), reference=0.0)


def _basis(delta: Sparse | Spectral) -> str:
    return delta.transform if isinstance(delta, Spectral) else ""


def _sparse_distance2(x: Sparse | Spectral, y: Sparse | Spectral) -> float:
    """Return ||dW_x - dW_y||_F^2 over the entries that either stores, in one orthonormal basis."""
    at, where = torch.unique(torch.cat([decoded(x.indices), decoded(y.indices)]), return_inverse=True)
    both = torch.cat([x.values.double() * x.scale, y.values.double() * -y.scale])
    return float(torch.zeros(len(at), dtype=torch.float64).index_add_(0, where, both).square().sum())


def _product_norm2(b: Tensor, a: Tensor, reference: float) -> float:
    """Return ||b a||_F^2 for float64 b (..., m, r), a (..., r, n)."""
    value = float(((b.mT @ b) * (a @ a.mT)).sum())
    if value > _CANCELLED * reference:
        return max(value, 0.0)
    rb, ra = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    return float((rb @ ra.mT).square().sum())
