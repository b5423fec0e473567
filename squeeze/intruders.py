"""Intruder dimensions: leading singular vectors of W0 + dW that resemble none of W0's, and their shrinking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import UsageError
from adaptc.factor import decoded
from adaptc.lowrank import low_rank
from adaptc.passes import Change, Context, Need, Pass, one_blas_thread, run
from adaptc.squeeze.eigenbase import Left, Spectra

TOP, COSINE, FACTOR = 10, 0.5, 0.75
_DENSE = 384  # up to here the whole small eigenproblem is cheaper than Lanczos


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading left singular vectors of W = W0 + dW: u (m, k), s (k,), and how each resembles W0's.

    `cosine` (k,): the largest |<u_j, u0_i>| over all i. `energy`: ||W||_F^2. All float64.
    """

    u: Tensor
    s: Tensor
    cosine: Tensor
    energy: float

    def intruders(self, cosine: float) -> Tensor:
        """Return the indices j with cosine_j < `cosine`."""
        return torch.nonzero(self.cosine < cosine)[:, 0]


@dataclass(frozen=True)
class Module:
    """What one module shows: the number of intruders among the leading `top` singular vectors, their share of
    ||W0 + dW||^2, and the cosines of the leading vectors, in order. `note` says why there are none to show.
    """

    key: str
    shape: tuple[int, ...]
    count: int
    share: float
    cosines: tuple[float, ...]
    note: str = ""


def leading(w0: Tensor, factors: LowRank | None, base: Left, top: int) -> Leading:
    """Return the `top` leading left singular vectors of W = W0 + B A, from W0's own and the factors.

    With U0 extended by the part of B outside its span to Q, and c = Q^T B, p = Q^T W0 A^T, the matrix Q^T W W^T Q is
    diag(s0^2) + p c^T + c p^T + c (A A^T) c^T: diagonal and low rank. Its eigenvectors q give u = Q q, and their
    entries are the cosines with W0's vectors. Cost O(m n r) for p, then O(m r) a Lanczos step (dense when small);
    nothing of W's size is formed or decomposed. arXiv 2410.21228, which decomposes W0 and W in full.
    """
    u0, s0 = base.u.double(), base.s.double()
    w = w0.flatten(1).double()
    energy = float(w.square().sum())
    if factors is None:
        k = min(top, len(s0))
        return Leading(u0[:, :k], s0[:k], torch.ones(k, dtype=torch.float64), energy)
    b, a = factors.factors()
    a = a.flatten(1)
    wide, g = w @ a.mT, a @ a.mT  # (m, r), (r, r)
    extra = _outside(u0, b)
    c = torch.cat([u0, extra], 1).mT @ b
    p = torch.cat([u0.mT @ wide, wide.new_zeros(extra.shape[1], wide.shape[1])])
    diagonal = torch.cat([s0.square(), s0.new_zeros(extra.shape[1])])
    values, q = _top(diagonal, c, p + 0.5 * c @ g, min(top, len(s0)))
    u0 = torch.cat([u0, extra], 1)
    energy += 2 * float((wide * b).sum()) + float(((b.mT @ b) * g).sum())
    return Leading(u0 @ q, values.clamp(min=0.0).sqrt(), q[: len(s0)].abs().amax(0), max(energy, 0.0))


def _outside(u0: Tensor, b: Tensor) -> Tensor:
    """Return an orthonormal basis (m, e) of what b has outside the span of u0: nothing where u0 is square."""
    if u0.shape[0] <= u0.shape[1]:
        return u0[:, :0]
    u, s, _ = torch.linalg.svd(b - u0 @ (u0.mT @ b), full_matrices=False)
    # u0 is orthonormal to float32: what is smaller than that may lie in its span and is no direction of its own
    extra = u[:, : u0.shape[0] - u0.shape[1]][:, (s > 1e-6 * torch.linalg.matrix_norm(b))[: u0.shape[0] - u0.shape[1]]]
    basis: Tensor = torch.linalg.qr(extra - u0 @ (u0.mT @ extra)).Q
    return basis


def _top(diagonal: Tensor, c: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenvalues and vectors (m, k) of diag + p c^T + c p^T, descending."""
    m = len(diagonal)
    if m <= _DENSE or k >= m - 1:
        low = p @ c.mT
        values, q = torch.linalg.eigh(torch.diag(diagonal) + low + low.mT)
        return values.flip(-1)[:k], q.flip(-1)[:, :k]
    d, left, right = diagonal.numpy()[:, None], c.numpy(), p.numpy()

    def times(x: Any) -> Any:
        x = x.reshape(m, -1)
        return d * x + right @ (left.T @ x) + left @ (right.T @ x)

    operator = LinearOperator((m, m), matvec=lambda x: times(x)[:, 0], matmat=times, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(m)  # fixed, so that the same input gives the same bits
    found, vectors = eigsh(operator, k=k, which="LA", v0=start, ncv=min(m, max(4 * k, 40)))
    order = np.argsort(-found)
    return torch.from_numpy(found[order].copy()), torch.from_numpy(vectors[:, order].copy())


def shrink(delta: LowRank, w0: Tensor, found: Leading, cosine: float, factor: float) -> LowRank:
    """Return dW + (factor - 1) sum_j s_j u_j v_j^T over the intruders j of W0 + dW, as stored factors side by side.

    s_j v_j^T = u_j^T W0 + (u_j^T B) A exactly. The stored factors stay bit for bit; rank grows by the number of
    intruders, each with sqrt of its size on both sides.
    """
    at = found.intruders(cosine)
    if not len(at):
        return delta
    u, size = found.u[:, at], ((1 - factor) * found.s[at]).sqrt()
    b, a = delta.factors()
    row = u.mT @ w0.flatten(1).double() + (u.mT @ b) @ a  # s_j v_j^T, (p, n)
    sign = -1.0 if delta.scale > 0 else 1.0
    root = abs(delta.scale) ** 0.5
    new_b = (u * size / root).to(delta.b.dtype)
    new_a = (sign * row / found.s[at][:, None] * size[:, None] / root).to(delta.a.dtype)
    core = None
    if delta.core is not None:
        held = decoded(delta.core)
        core = held.new_zeros(held.shape[0] + len(at), held.shape[1] + len(at))
        core[: held.shape[0], : held.shape[1]] = held
        core[held.shape[0] :, held.shape[1] :] = torch.eye(len(at))
    return LowRank(torch.cat([decoded(delta.a), new_a]), torch.cat([decoded(delta.b), new_b], 1), core, delta.scale,
                   delta.shape)


def inspect_intruders(adapter: Adapter, ctx: Context, spectra: Spectra, top: int = TOP, cosine: float = COSINE
                      ) -> tuple[Module, ...]:
    """Return the intruders of every module of `adapter` on the base in `ctx`; what has none to show says why."""
    def one(key: str) -> Module:
        delta = adapter.deltas[key]
        why = refused(delta)
        if why:
            return Module(key, tuple(delta.shape), 0, 0.0, (), why)
        assert ctx.base is not None
        w0 = ctx.base.weight(key, delta.shape)
        found = leading(w0, _factors(delta), spectra.left(w0), top)
        at = found.intruders(cosine)
        share = float(found.s[at].square().sum()) / found.energy if found.energy else 0.0
        return Module(key, tuple(delta.shape), len(at), share, tuple(found.cosine.tolist()), _tall(delta.shape))

    with one_blas_thread():
        return tuple(run(one, list(adapter.deltas), ctx, "intruders"))


def refused(delta: Delta) -> str:
    """Return why a delta is left out, "" where it is not: no matrix, or no low-rank factors."""
    if isinstance(delta, NeedsBase):
        return f"{delta.kind} is no plain change of the weight"
    if len(delta.shape) < 2 or (isinstance(delta, LowRank) and len(delta.b.shape) > 2):
        return "no single matrix"
    return "" if low_rank(delta) is not None else "no low-rank factors"


def _factors(delta: Delta) -> LowRank | None:
    factors = low_rank(delta) if not isinstance(delta, NeedsBase) else None
    return factors if factors is not None and factors.rank else None


def _tall(shape: Sequence[int]) -> str:
    m, n = shape[0], math.prod(shape[1:])
    return f"{m} outputs of {n} inputs: W0 spans only a part, cosines are lower for that alone" if m > n else ""


@dataclass(frozen=True, slots=True)
class Setting:
    """What shrinking one module needs."""

    base: Base
    spectra: Spectra


@dataclass(frozen=True, kw_only=True)
class Shrink(Pass):
    """Scale down the intruder dimensions of W0 + dW by `factor`, against forgetting what the base knew.

    Intruders are those of the `top` leading left singular vectors whose largest |cosine| with any of W0's is below
    `cosine` (arXiv 2410.21228; defaults as PEFT has them). dW' = dW + (factor - 1) sum s_j u_j v_j^T, exact and low
    rank: each intruder adds one to the rank, `truncate` after it takes that back at a measured error. The paper finds
    less forgetting at a small cost on the task; it is no way to make a file smaller. Modules without intruders stay as
    they are, bit for bit.
    """

    name: ClassVar[str] = "shrink"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    factor: float = FACTOR
    top: int = TOP
    cosine: float = COSINE

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise UsageError(f"factor is {self.factor}, must be from 0 to below 1")
        if not 0 < self.cosine <= 1:
            raise UsageError(f"cosine is {self.cosine}, must be above 0 and at most 1")
        if self.top < 1:
            raise UsageError(f"top is {self.top}, must be 1 or more")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` is one matrix with low-rank factors."""
        return not refused(delta)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Setting]:
        """Return the base and its spectra for every module."""
        assert ctx.base is not None
        return dict.fromkeys(self.selected(adapter), Setting(ctx.base, Spectra(ctx.cache)))

    def delta(self, key: str, delta: Delta, setting: Setting) -> Change:
        """Return `delta` with its intruders shrunk; the error is the measured change of dW."""
        factors = _factors(delta)
        if factors is None:
            return Change(delta, 0.0)
        w0 = setting.base.weight(key, delta.shape)
        found = leading(w0, factors, setting.spectra.left(w0), self.top)
        count = len(found.intruders(self.cosine))
        if not count:
            return Change(delta, 0.0, "no intruders")
        if not isinstance(delta, LowRank):
            factors = replace(factors, a=decoded(factors.a).float(), b=decoded(factors.b).float())
        return Change(shrink(factors, w0, found, self.cosine, self.factor), note=f"{count} intruders shrunk")
