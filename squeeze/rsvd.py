"""Randomised SVD (Halko, Martinsson, Tropp 2011), for dense deltas and, by choice, for the core of factors."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze.factored import Core, check_finite


def rsvd(w: Tensor, k: int, oversample: int, power: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 (u, s, vh) of rank min(k + oversample, m, n), approximating the leading SVD of w (m, n).

    Range finder: Y = (w w^T)^power w Omega with Omega Gaussian (n, k + oversample), orthonormalised between powers;
    then the exact SVD of Q^T w. Deterministic under `seed`. Do not use it on an r x r core to save time: the exact SVD
    of the core costs the same and loses nothing; it is here because LoRA-Squeeze (arXiv 2602.10993) specifies it.
    """
    n = w.shape[-1]
    width = min(k + oversample, *w.shape[-2:])
    omega = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(w @ omega).Q
    for _ in range(power):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.mT @ w, full_matrices=False)
    return q @ u, s, vh


def core_rsvd(b: Tensor, a: Tensor, middle: Tensor | None, scale: float, k: int, oversample: int, power: int, seed: int
              ) -> Core:
    """Return the randomised SVD of scale * b @ middle @ a as a Core (LoRA-Squeeze, Alg. 2).

    QR of both factors in float64, then RSVD of the small core, which is kept to measure against. Raises FormatError for
    NaN or Inf.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    check_finite(r_b, r_a)
    small = (r_b if middle is None else r_b @ middle) @ r_a.mT * scale
    parts = [rsvd(w, k, oversample, power, seed) for w in small.reshape(-1, *small.shape[-2:])]
    u, s, vh = (torch.stack(t).reshape(*b.shape[:-2], *t[0].shape) for t in zip(*parts, strict=True))
    return Core(s, u, vh, q_b, q_a.mT, small)
