"""Base-dependent deltas that rotate W0: orthogonal fine-tuning on the input side, RoAd on the output side."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError


def skew(upper: Tensor) -> Tensor:
    """Return the skew-symmetric float64 matrices (..., b, b) of strict upper triangles (..., b(b-1)/2), row by row."""
    b = round((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2)
    if b * (b - 1) // 2 != upper.shape[-1]:
        raise FormatError(f"{upper.shape[-1]} entries are no strict upper triangle")
    rows, cols = torch.triu_indices(b, b, 1)
    s = torch.zeros(*upper.shape[:-1], b, b, dtype=torch.float64)
    s[..., rows, cols] = upper.double()
    return s - s.mT


def neumann(s: Tensor, terms: int) -> Tensor:
    """Return I + 2S + 2S^2 + ... + 2S^(k-2) + S^(k-1), the truncated series of (I + S)(I - S)^-1 with k terms.

    As PEFT runs it: the last term counts once only from the cube on, so 2 terms are I + 2S, and 3 terms are 4.
    """
    r = torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s).clone()
    if terms <= 2:
        return r + 2 * (terms - 1) * s
    power = s
    last = max(terms, 4) - 1
    for k in range(1, last + 1):
        r += power if k == last else 2 * power
        power = power @ s
    return r


def cayley(s: Tensor) -> Tensor:
    """Return the rotation (I - S)(I + S)^-1 of a skew-symmetric matrix."""
    eye = torch.eye(s.shape[-1], dtype=s.dtype)
    made: Tensor = torch.linalg.solve(eye + s, (eye - s).expand_as(s), left=False)
    return made


def oft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W'[:, blk] = W0[:, blk] R_blk^T, R from skew blocks by Neumann series or Cayley. OFT, arXiv 2306.07280."""
    s = skew(delta.tensors["R"])  # (blocks or 1, b, b)
    terms = delta.config.get("terms")
    return _blocks(delta, w0, neumann(s, int(terms)) if terms else cayley(s))


def boft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = s o (W0 with each input block rotated): BOFT with one butterfly factor. arXiv 2311.06243."""
    r = delta.tensors["R"].double()[0]  # (blocks, b, b)
    rotated = _blocks(delta, w0, cayley((r - r.mT) / 2)).dense() + w0.double()
    return Dense(delta.tensors["s"].double().reshape(-1, *(1 for _ in w0.shape[1:])) * rotated - w0.double(), 1.0,
                 tuple(w0.shape))


def _blocks(delta: NeedsBase, w0: Tensor, r: Tensor) -> Dense:
    w = w0.double().flatten(1)
    out, n = w.shape
    b = r.shape[-1]
    if n % b or r.shape[0] not in (1, n // b):
        raise FormatError(f"{delta.kind} has {r.shape[0]} blocks of {b} for {n} inputs")
    turned = torch.einsum("onb,ncb->onc", w.reshape(out, n // b, b), r.expand(n // b, b, b))
    return Dense((turned.reshape(out, n) - w).reshape(w0.shape), 1.0, tuple(w0.shape))


def hra(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 prod_j (I - 2 u_j u_j^T), or W0 (I - 2 Q Q^T) with Q = Gram-Schmidt(u); rank <= r. HRA, arXiv 2405.17484.

    The product of reflections is I - V T V^T with upper triangular T (compact WY form), so dW = -(W0 V T) V^T.
    """
    u = delta.tensors["u"].double()  # (in k^2, r)
    w, r = w0.double().flatten(1), u.shape[1]
    if u.shape[0] != w.shape[1]:
        raise FormatError(f"hra_u has {u.shape[0]} rows for {w.shape[1]} inputs")
    if delta.config["orthogonal"]:
        v, t = _gram_schmidt(u), 2 * torch.eye(r, dtype=torch.float64)
    else:
        v, t = u / u.norm(dim=0), torch.zeros(r, r, dtype=torch.float64)
        for j in range(r):
            t[j, j] = 2.0
            t[:j, j] = -2 * t[:j, :j] @ (v[:, :j].mT @ v[:, j])
    return LowRank(v.mT, -(w @ v) @ t, None, 1.0, tuple(w0.shape))


def _gram_schmidt(u: Tensor) -> Tensor:
    """Return the orthonormal basis that Gram-Schmidt makes of the columns of u (diagonal of R positive)."""
    q, r = torch.linalg.qr(u)
    basis: Tensor = q * r.diagonal().sign()
    return basis


def road(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """y -> f o y + t o rot(y) on outputs, f = alpha cos(theta), t = alpha sin(theta), rot: (x1, x2) -> (-x2, x1) in
    each group of g; W' = R W0 and b' = R b. RoAd, arXiv 2409.00119.
    """
    theta, alpha = delta.tensors["theta"].double(), delta.tensors["alpha"].double()
    g, variant = int(delta.config["group"]), delta.config["variant"]
    f, t = alpha * theta.cos(), alpha * theta.sin()
    out = w0.shape[0]
    if variant == "road_1":
        f, t = (v.reshape(-1, 1, g // 2).expand(-1, 2, -1).reshape(-1) for v in (f, t))
    elif variant == "road_4":
        f, t = f.reshape(-1, 2, g)[:, 0].reshape(-1), t.reshape(-1, 2, g)[:, 1].reshape(-1)
    if f.numel() != out or out % g:
        raise FormatError(f"road_theta has {theta.numel()} entries for {out} outputs in groups of {g}")
    w = w0.double().reshape(out, -1)
    halves = w.reshape(out // g, 2, g // 2, -1)
    turned = torch.stack([-halves[:, 1], halves[:, 0]], 1).reshape(w.shape)
    return Dense((f[:, None] * w + t[:, None] * turned - w).reshape(w0.shape), 1.0, tuple(w0.shape))


def road_bias(delta: NeedsBase, w0: Tensor, b0: Tensor) -> BaseFree:
    """b' = R b: outputs are turned after the bias is added."""
    return road(delta, b0)
