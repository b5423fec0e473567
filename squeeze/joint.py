"""The joint core: several deltas of one parameter as small matrices in common orthonormal bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptc.delta import BaseFree
from adaptc.lowrank import low_rank
from adaptc.squeeze.factored import check_finite, gram, project

# Past this bound on the condition number of a stacked factor, Cholesky bases lose orthogonality beyond 1e-8: then QR.
CHOLESKY_LIMIT = 1e4
# Directions this far below the largest one are rounding noise of float64.
_ZERO = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One input's dW = scale * b @ core @ a, factors in their stored dtype; rank 0 stands for zero."""

    b: Tensor  # (..., m, r_b)
    a: Tensor  # (..., r_a, n)
    core: Tensor | None
    scale: float

    @property
    def middle(self) -> Tensor:
        """Return scale * core, (r_b, r_a) float64."""
        core = torch.eye(self.b.shape[-1], device=self.b.device) if self.core is None else self.core
        return core.double() * self.scale

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return float64 (b', a') with dW = b' @ a': sqrt(|scale|) on both, its sign on a', the core in b'."""
        root = math.sqrt(abs(self.scale))
        b = self.b.double() if self.core is None else self.b.double() @ self.core.double()
        return b * root, self.a.double() * math.copysign(root, self.scale)

    def expert(self, i: int) -> Part:
        """Return the part of expert i of a batch."""
        return replace(self, b=self.b[i], a=self.a[i]) if self.b.dim() == 3 else self


def part(delta: BaseFree, device: str = "cpu") -> Part:
    """Return `delta` as a Part; one without factors is W times an identity on its shorter side."""
    factors = low_rank(delta)
    if factors is None:
        w = delta.dense().reshape(delta.shape[0], -1).to(device)
        eye = torch.eye(min(w.shape), dtype=torch.float64, device=device)
        b, a = (w, eye) if w.shape[1] <= w.shape[0] else (eye, w)
        return Part(b, a, None, 1.0)
    if not isinstance(factors.a, Tensor) or not isinstance(factors.b, Tensor) or factors.core is not None:
        b, a = factors.factors()
        return Part(b.to(device), a.to(device), None, 1.0)
    return Part(factors.b.to(device), factors.a.to(device), None, factors.scale)


def absent(like: Part) -> Part:
    """Return the zero of the same shape: rank 0."""
    return Part(like.b[..., :0], like.a[..., :0, :], None, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Lifted:
    """A pair as stored, b (m, k), a (k, n), with the small float64 products that measure it against stacked factors."""

    b: Tensor
    a: Tensor
    cross_b: Tensor  # (R, k)  B^T b
    cross_a: Tensor  # (R, k)  A a^T
    own: float  # ||b a||^2


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Deltas dW_t = U M_t V^T with orthonormal U = b @ map_b (m, p) and V^T = map_a @ a (q, n), all float64 but b, a.

    Lossless for every dW_t. Core Space (arXiv 2509.17786) defines it; here the bases come from a Cholesky or QR of the
    stacked factors, so nothing of size (m, n) is formed. Cost O((m + n) R^2 + T R^3), R the sum of the ranks.
    """

    b: Tensor  # (m, R)
    a: Tensor  # (R, n)
    map_b: Tensor  # (R, p)
    map_a: Tensor  # (q, R)
    cores: Tensor  # (T, p, q)

    def canonical(self) -> Joint:
        """Return the same deltas in the singular bases of the deltas themselves.

        U: left singular vectors of [dW_1 ... dW_T], V: right ones of [dW_1; ...; dW_T]. They depend on the deltas
        alone, not on how they were factored, up to signs, under which every elementwise method is equivariant.
        """
        t, p, q = self.cores.shape
        u, s, _ = torch.linalg.svd(self.cores.permute(1, 0, 2).reshape(p, t * q), full_matrices=False)
        _, z, vh = torch.linalg.svd(self.cores.reshape(t * p, q), full_matrices=False)
        u, vh = u[:, : _count(s)], vh[: _count(z)]
        return replace(self, map_b=self.map_b @ u, map_a=vh @ self.map_a, cores=u.mT @ self.cores @ vh.mT)

    def weighted(self, weights: Sequence[float]) -> Tensor:
        """Return sum_t w_t M_t (p, q)."""
        return torch.einsum("t,tpq->pq", torch.tensor(weights, dtype=torch.float64, device=self.b.device), self.cores)

    def left(self, x: Tensor) -> Tensor:
        """Return U @ x (m, k) for x (p, k)."""
        return self.b.double() @ (self.map_b @ x)

    def right(self, x: Tensor) -> Tensor:
        """Return x @ V^T (k, n) for x (k, q)."""
        return (x @ self.map_a) @ self.a.double()

    def lift(self, core: Tensor, k: int, dtype: torch.dtype, scale: float = 1.0) -> Lifted:
        """Return the best rank-k part of scale * U core V^T cast once to `dtype`, sqrt(sigma) on both sides."""
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        k = min(k, _count(s))
        root = (s[:k] * abs(scale)).sqrt()
        return self.keep(self.b, self.map_b @ (u[:, :k] * root), self.a,
                         (root[:, None] * vh[:k]) @ self.map_a * math.copysign(1.0, scale), dtype)

    def keep(self, b: Tensor, to_b: Tensor, a: Tensor, to_a: Tensor, dtype: torch.dtype) -> Lifted:
        """Return b @ to_b and to_a @ a in `dtype` with what measures them; b and a may be the joint's own factors."""
        new_b, cross_b, own_b = project(b, to_b, dtype)
        new_at, cross_a, own_a = project(a.mT, to_a.mT, dtype)
        if b is not self.b:
            cross_b, cross_a = self.b.double().mT @ new_b.double(), self.a.double() @ new_at.double()
        return Lifted(new_b, new_at.mT.contiguous(), cross_b, cross_a, float((own_b * own_a).sum()))

    def departure(self, target: Tensor, made: Lifted) -> tuple[float, float]:
        """Return (||U target V^T - b a||_F / ||target||_F, ||target||_F^2) for a pair as stored.

        From products of size R by k; where those cancel (below about 3e-5), from QR factors of the stacked pair.
        """
        total = float(target.square().sum())
        if total <= 0.0:
            return (0.0 if made.own <= 0.0 else math.inf), total
        inner = float(((target.mT @ (self.map_b.mT @ made.cross_b)) * (self.map_a @ made.cross_a)).sum())
        left = total - 2 * inner + made.own
        if left <= 1e-9 * total:
            v = self.right(torch.eye(target.shape[1]).to(target))
            r_b = torch.linalg.qr(torch.cat([self.left(target), -made.b.double()], 1), mode="r").R
            r_a = torch.linalg.qr(torch.cat([v, made.a.double()], 0).mT, mode="r").R
            left = float((r_b @ r_a.mT).square().sum())
        return math.sqrt(left / total), total


def joint(parts: Sequence[Part]) -> Joint:
    """Return the joint core of two-dimensional parts of one shape. Raises FormatError for NaN or Inf."""
    b, map_b, coords_b = _basis(torch.cat([p.b for p in parts], 1))
    at, map_at, coords_a = _basis(torch.cat([p.a for p in parts], 0).mT)
    cores, i, j = [], 0, 0
    for p in parts:
        r_b, r_a = p.b.shape[1], p.a.shape[0]
        cores.append(coords_b[:, i : i + r_b] @ p.middle @ coords_a[:, j : j + r_a].mT)
        i, j = i + r_b, j + r_a
    return Joint(b, at.mT, map_b, map_at.mT, torch.stack(cores))


def _basis(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x', map, coords): U = x' @ map is orthonormal and x = U @ coords. x: (rows, R); map, coords float64."""
    if x.shape[1] <= x.shape[0]:
        g = gram(x)
        check_finite(g)
        lower, info = torch.linalg.cholesky_ex(g)
        if not bool(info):
            eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            if float(lower.norm() * inverse.norm()) <= CHOLESKY_LIMIT:
                return x, inverse.mT, lower.mT
    q, r = torch.linalg.qr(x.double())
    check_finite(r)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    keep = _count(s)
    return q, u[:, :keep], s[:keep, None] * vh[:keep]


def _count(s: Tensor) -> int:
    """Return how many of the descending singular values are not rounding noise, at least 1 where there are any."""
    return max(int((s > _ZERO * s[0]).sum()), 1) if len(s) else 0

