"""Base-dependent deltas built on a decomposition of W0."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError
from adaptc.resolve_rotation import neumann, skew


def pissa(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 - [W0]_r + s B A: the factors replace the top-r part of W0; dW has rank 2r. PiSSA, arXiv 2404.02948."""
    b, a = _factors(delta)
    u, sigma, vh = _svd(w0)
    r = a.shape[0]
    return _beside(b, a, -u[:, :r] * sigma[:r], vh[:r], w0)


def olora(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 - s Q[:, :r] R[:r] + s B A with W0 = Q R; dW has rank 2r. OLoRA, arXiv 2406.01775."""
    b, a = _factors(delta)
    q, upper = torch.linalg.qr(w0.double().flatten(1))
    r = a.shape[0]
    return _beside(b, a, -float(delta.config["scale"]) * q[:, :r], upper[:r], w0)


def kasa(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 without its r smallest singular components + s B diag(d) A. KaSA, arXiv 2412.06071."""
    b, a = _factors(delta)
    u, sigma, vh = _svd(w0)
    r = a.shape[0]
    return _beside(b * delta.tensors["diag"].double(), a, -u[:, -r:] * sigma[-r:], vh[-r:], w0)


def osf(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = [W0]_k + U S V: everything below the top k singular directions is replaced. OSF, arXiv 2504.07097."""
    t = {k: v.double() for k, v in delta.tensors.items()}
    k = min(w0.shape) - t["S_low"].numel()
    u, sigma, vh = _svd(w0)
    if k < 0 or t["U_low"].shape[0] != w0.shape[0] or t["V_low"].shape[1] != w0.shape[1]:
        raise FormatError(f"osf factors of rank {t['S_low'].numel()} do not fit {tuple(w0.shape)}")
    dw = (t["U_low"] * t["S_low"]) @ t["V_low"] - (u[:, k:] * sigma[k:]) @ vh[k:]
    return Dense(dw, 1.0, tuple(w0.shape))


def psoft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = U_r S_r (R - I) V_r: a rotation inside the top-r singular subspace of W0. PSOFT, openreview FSHrinMArK.

    With config root the singular values stand half on each side. R = b o Cayley(S) o a, or a free matrix.
    """
    t, config = delta.tensors, delta.config
    if not config["orthogonal"]:
        r_matrix = t["R"].double()
    elif config.get("terms"):
        s = skew(t["R"])
        limit = config.get("limit")
        if limit is not None and float(s.norm()) > limit:
            s = s * (limit / (s.norm() + 1e-12))
        r_matrix = neumann(s, int(config["terms"]))
    else:
        s = skew(t["R"])
        eye = torch.eye(s.shape[-1], dtype=torch.float64)
        r_matrix = torch.linalg.solve(eye - s, eye + s, left=False)
    if "b" in t:
        r_matrix = t["b"].double()[:, None] * r_matrix
    if "a" in t:
        r_matrix = r_matrix * t["a"].double()
    u, sigma, vh = _svd(w0)
    r = r_matrix.shape[0]
    left = sigma[:r].sqrt() if config["root"] else sigma[:r]
    right = sigma[:r].sqrt()[:, None] * vh[:r] if config["root"] else vh[:r]
    turned = (u[:, :r] * left) @ (r_matrix - torch.eye(r, dtype=torch.float64))
    return LowRank(right, turned, None, 1.0, tuple(w0.shape))


def deft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = Q (s R - P^T W0): a projection of W0 is replaced by a trained one; without R only removed (PaRa). rank <= r.

    config method "qr": both are Q of P's QR; "relu": P itself, with relu(P) as the projector. s is alpha/r, or 1.
    """
    p = delta.tensors["P"].double()  # (out, r)
    q = torch.linalg.qr(p).Q if delta.config["method"] == "qr" else p
    right = q if delta.config["method"] == "qr" else torch.relu(p)
    inside = -right.mT @ w0.double()
    if "R" in delta.tensors:
        inside = inside + float(delta.config["scale"]) * delta.tensors["R"].double()
    return LowRank(inside, q, None, 1.0, tuple(w0.shape))


def frod(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = U (S + diag l) V^T with U the normalised columns of W0 V^-T, S sparse, V shared per module category."""
    t, w0 = delta.tensors, w0.double()
    v = t["V"].double()
    if v.shape != (w0.shape[1], w0.shape[1]):
        raise FormatError(f"frod_V is {tuple(v.shape)}, W0 has {w0.shape[1]} inputs")
    u = torch.linalg.solve(v, w0.mT).mT
    size = u.norm(dim=0)
    u = torch.where(size > 1e-12, u / size.clamp_min(1e-12), torch.zeros_like(u))
    s = torch.diag(t["l"].double())
    s.index_put_(tuple(t["indices"].long()), t["values"].double(), accumulate=True)
    return Dense(u @ s @ v.mT - w0, 1.0, tuple(w0.shape))


def _factors(delta: NeedsBase) -> tuple[Tensor, Tensor]:
    if not isinstance(delta.inner, LowRank):
        raise FormatError(f"{delta.kind} has no factors")
    return delta.inner.factors()


def _svd(w0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of W0, computed in float32: so was the base that the training saw, rounding included."""
    u, sigma, vh = torch.linalg.svd(w0.float().flatten(1), full_matrices=False)
    return u.double(), sigma.double(), vh.double()


def _beside(b: Tensor, a: Tensor, left: Tensor, right: Tensor, w0: Tensor) -> LowRank:
    return LowRank(torch.cat([a, right]), torch.cat([b, left], 1), None, 1.0, tuple(w0.shape))
