"""The exact truncated SVD of dW = s B M A from its factors, never forming the product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import FormatError

# Past this condition number of a factor the Gram route has lost too many digits of the small directions; QR has not.
GRAM_LIMIT = 1e5
# Rows are upcast to float64 in blocks of this many entries: 1 MiB, which stays in the L2 cache.
_BLOCK = 2**17


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """SVD dW = left @ diag(s) @ right, kept as small maps: left = b @ map_b and right = map_a @ a.

    When the factors were too badly conditioned for that, `q_b` and `q_a` hold orthonormal bases that take the places
    of b and a. s: (..., r) float64, descending. `whole` is dW between these bases where s holds only a part of it.
    """

    s: Tensor
    map_b: Tensor  # (..., r_b, r)
    map_a: Tensor  # (..., r, r_a)
    q_b: Tensor | None = None  # (..., m, r_b)
    q_a: Tensor | None = None  # (..., r_a, n)
    whole: Tensor | None = None  # (..., r_b, r_a)

    @property
    def energy(self) -> float:
        """Return ||dW||_F^2, of all of dW."""
        return float((self.s if self.whole is None else self.whole).square().sum())

    def maps(self, k: int) -> tuple[Tensor, Tensor]:
        """Return (..., r_b, k) and (..., k, r_a): the best rank-k part is b @ first, second @ a, sqrt(s) on both."""
        root = self.s[..., :k].sqrt()
        return self.map_b[..., :k] * root[..., None, :], root[..., :, None] * self.map_a[..., :k, :]


def core_svd(b: Tensor, a: Tensor, middle: Tensor | None = None, scale: float = 1.0) -> Core:
    """Return the SVD of scale * b @ middle @ a for b (..., m, r_b), a (..., r_a, n); leading axes are a batch.

    Gram route, in float64: G_B = B^T B = R_B^T R_B and G_A = A A^T = R_A^T R_A by Cholesky, then the SVD of the small
    core R_B M R_A^T = U S V^T, so that left = B R_B^-1 U and right = V^T R_A^-T A. Factors worse conditioned than
    GRAM_LIMIT (rank-deficient ones included) go through QR of B and A^T instead. Cost O((m + n) r^2). Method:
    LoRA-Squeeze (arXiv 2602.10993), Alg. 2, with an exact SVD of the core. Raises FormatError for NaN or Inf.
    """
    g_b, g_a = gram(b), gram(a.mT)
    check_finite(g_b, g_a)
    roots = [_root(g) for g in (g_b, g_a)]
    if roots[0] is None or roots[1] is None:
        return _core_qr(b, a, middle, scale)
    (r_b, inv_b), (r_a, inv_a) = roots[0], roots[1]
    u, s, vh = _svd(r_b, r_a, middle, scale)
    return Core(s, inv_b @ u, vh @ inv_a.mT)


def gram(x: Tensor) -> Tensor:
    """Return x^T x (..., r, r) in float64 for x (..., rows, r) of any float dtype, upcast block by block."""
    out = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)
    for _, rows in _blocks(x):
        out += rows.mT @ rows
    return out


def _blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, float64 block) over the second last axis of x."""
    step = max(256, _BLOCK // max(x.shape[-1], 1))
    for at in range(0, x.shape[-2], step):
        rows = slice(at, min(at + step, x.shape[-2]))
        yield rows, x[..., rows, :].double()


def check_finite(*small: Tensor) -> None:
    """Raise FormatError unless Grams or R factors are finite; NaN and Inf in a factor always reach them."""
    if not all(bool(torch.isfinite(t).all()) for t in small):
        raise FormatError("factors are not finite")


def _root(g: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return upper R with R^T R = g and R^-1, None where ||R||_F ||R^-1||_F, a bound on cond(R), is past GRAM_LIMIT."""
    lower, info = torch.linalg.cholesky_ex(g)
    if bool(info.any()):
        return None
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device).expand_as(g)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    bound = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse)
    return (lower.mT, inverse.mT) if bool((bound <= GRAM_LIMIT).all()) else None


def _svd(r_b: Tensor, r_a: Tensor, middle: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of scale * r_b @ middle @ r_a^T; a negative scale turns the sign of the left side."""
    left = r_b if middle is None else r_b @ middle.to(r_b)
    u, s, vh = torch.linalg.svd(left @ r_a.mT, full_matrices=False)
    return (u if scale >= 0 else -u), s * abs(scale), vh


def _core_qr(b: Tensor, a: Tensor, middle: Tensor | None, scale: float) -> Core:
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = _svd(r_b, r_a, middle, scale)
    return Core(s, u, vh, q_b, q_a.mT)


def spectrum(b: Tensor, a: Tensor, middle: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Return the singular values of scale * b @ middle @ a, float64, descending."""
    return core_svd(b, a, middle, scale).s


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A truncated pair as stored: b (..., m, k), a (..., k, n), and its measured relative error."""

    b: Tensor
    a: Tensor
    error: float


def truncate(b: Tensor, a: Tensor, k: int, *, middle: Tensor | None = None, scale: float = 1.0,
             dtype: torch.dtype = torch.float64, core: Core | None = None) -> Stored:
    """Return the rank-k pair closest to dW = scale * b @ middle @ a in every unitarily invariant norm (Eckart-Young).

    Computed in float64, cast once to `dtype`; `error` is ||dW - b' a'||_F / ||dW||_F of what was stored, with casts,
    from small products; where those cancel (error below about 3e-5), from the QR factors of the stacked pair.
    Pass `core` when it is already known. Raises FormatError for factors that are not finite.
    """
    core = core or core_svd(b, a, middle, scale)
    map_b, map_a = core.maps(k)
    orthonormal = core.q_b is not None and core.q_a is not None
    left_in, right_in = (core.q_b, core.q_a) if core.q_b is not None and core.q_a is not None else (b, a)
    new_b, cross_b, own_b = project(left_in, map_b, dtype)
    new_at, cross_a, own_a = project(right_in.mT, map_a.mT, dtype)
    new_a = new_at.mT.contiguous()
    total = core.energy
    if total <= 0.0:
        return Stored(new_b, new_a, 0.0)
    # <dW, b' a'> through the core: dW = left_in K right_in with K = map_b^+ S map_a^+, and for orthonormal bases U S V.
    if core.whole is not None:
        weight = core.whole
    elif orthonormal:
        weight = (core.map_b * core.s[..., None, :]) @ core.map_a
    elif middle is not None:
        weight = scale * middle.double()
    else:
        weight = scale * torch.eye(b.shape[-1], dtype=torch.float64, device=b.device)
    inner = float(((weight.mT @ cross_b) * cross_a).sum())
    left = total - 2 * inner + float((own_b * own_a).sum())
    if left > 1e-9 * total:
        return Stored(new_b, new_a, float((left / total) ** 0.5))
    wide = left_in.double() @ weight
    r_b = torch.linalg.qr(torch.cat([wide, -new_b.double()], -1), mode="r").R
    r_a = torch.linalg.qr(torch.cat([right_in.double(), new_a.double()], -2).mT, mode="r").R
    return Stored(new_b, new_a, float((r_b @ r_a.mT).norm() / total**0.5))


def project(x: Tensor, to: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = x @ to in `dtype`, with x^T y and y^T y in float64, y as stored. x: (..., rows, r), to (..., r, k)."""
    y = x.new_empty(*x.shape[:-1], to.shape[-1], dtype=dtype)
    cross = to.new_zeros(*x.shape[:-2], x.shape[-1], to.shape[-1])
    own = to.new_zeros(*x.shape[:-2], to.shape[-1], to.shape[-1])
    for rows, block in _blocks(x):
        y[..., rows, :] = block @ to
        stored = y[..., rows, :].double()
        cross += block.mT @ stored
        own += stored.mT @ stored
    return y, cross, own
