"""The exact truncated SVD of dW = B A from its factors, never forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Past this condition number of a factor the Gram route has lost too many digits of the small directions; QR has not.
GRAM_LIMIT = 1e5


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """SVD of dW = left @ diag(s) @ right, kept as small maps.

    left = b @ map_b when `q_b` is None, else q_b @ map_b; right likewise from a. s: (r,) float64, descending.
    """

    s: Tensor  # (..., r)
    map_b: Tensor  # (..., r, r)  b @ map_b has orthonormal columns
    map_a: Tensor  # (..., r, r)  map_a @ a has orthonormal rows
    q_b: Tensor | None = None  # (..., m, r)
    q_a: Tensor | None = None  # (..., r, n)

    def factors(self, b: Tensor, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return float64 (b', a') of the best rank-k part, sqrt(s) on both sides. b (..., m, r), a (..., r, n)."""
        root = self.s[..., :k].sqrt()
        left = (self.q_b if self.q_b is not None else b) @ (self.map_b[..., :k] * root[..., None, :])
        right = (root[..., :, None] * self.map_a[..., :k, :]) @ (self.q_a if self.q_a is not None else a)
        return left, right


def core_svd(b: Tensor, a: Tensor) -> Core:
    """Return the SVD of b @ a for float64 b (..., m, r), a (..., r, n); leading axes are a batch.

    Gram route: G_B = B^T B = V_b d_b V_b^T, G_A = A A^T = V_a d_a V_a^T, then the r x r core
    diag(sqrt d_b) V_b^T V_a diag(sqrt d_a) = U S V^T, with left map V_b d_b^-1/2 U and right map V^T d_a^-1/2 V_a^T.
    A factor worse conditioned than GRAM_LIMIT (rank-deficient ones included) goes through QR instead:
    B = Q_B R_B, A^T = Q_A R_A, SVD of R_B R_A^T. Cost O((m + n) r^2). Method: LoRA-Squeeze (arXiv 2602.10993), Alg. 2,
    with an exact SVD of the core.
    """
    d_b, v_b = torch.linalg.eigh(b.mT @ b)
    d_a, v_a = torch.linalg.eigh(a @ a.mT)
    if not (_well(d_b) and _well(d_a)):
        return _core_qr(b, a)
    root_b, root_a = d_b.sqrt(), d_a.sqrt()
    u, s, vh = torch.linalg.svd(root_b[..., :, None] * (v_b.mT @ v_a) * root_a[..., None, :])
    return Core(s, (v_b / root_b[..., None, :]) @ u, vh @ (v_a / root_a[..., None, :]).mT)


def _well(d: Tensor) -> bool:
    """Return whether every Gram matrix of the batch with ascending eigenvalues d has sqrt-condition <= GRAM_LIMIT."""
    return bool((d[..., 0] * GRAM_LIMIT**2 > d[..., -1]).all())


def _core_qr(b: Tensor, a: Tensor) -> Core:
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return Core(s, u, vh, q_b, q_a.mT)


def spectrum(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values (..., r) of b @ a, float64, descending."""
    return core_svd(b, a).s


def truncate(b: Tensor, a: Tensor, k: int, core: Core | None = None) -> tuple[Tensor, Tensor]:
    """Return float64 (b', a') of rank k, the closest to b @ a in every unitarily invariant norm (Eckart-Young).

    b: (..., m, r), a: (..., r, n), 1 <= k <= r. Pass `core` when it is already known.
    """
    return (core or core_svd(b, a)).factors(b, a, k)


def cross_error(b: Tensor, a: Tensor, b2: Tensor, a2: Tensor, total: float) -> float:
    """Return ||b a - b2 a2||_F / ||b a||_F measured from the factors as they are, casts included; 0 for zero dW.

    `total` is ||b a||_F^2 (the sum of squared singular values). Only small cross products are formed; where the
    difference cancels (error below about 3e-5) the QR factors of the stacked pair are used instead.
    """
    if total <= 0.0:
        return 0.0
    inner = float(((b.mT @ b2) * (a @ a2.mT)).sum())
    after = float(((b2.mT @ b2) * (a2 @ a2.mT)).sum())
    left = total - 2 * inner + after
    if left > 1e-9 * total:
        return float((left / total) ** 0.5)
    r_b = torch.linalg.qr(torch.cat([b, -b2], -1), mode="r").R
    r_a = torch.linalg.qr(torch.cat([a, a2], -2).mT, mode="r").R
    return float((r_b @ r_a.mT).norm() / total**0.5)
