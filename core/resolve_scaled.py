"""Base-dependent deltas that scale W0, mix it with itself, or feed it through a small network."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, NeedsBase
from adaptc.errors import FormatError


def dora(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = (m / ||V||) o V with V = W0 + dW; the norm runs over every dim but 0 (config axis 1: but 1).

    DoRA, arXiv 2402.09353. m: `magnitude`, (out,) in any broadcast shape.
    """
    if delta.inner is None:
        raise FormatError("dora has no direction")
    w0 = w0.double()
    v = w0 + delta.inner.dense().reshape(w0.shape)
    axis = int(delta.config.get("axis", 0))
    over = [d for d in range(v.dim()) if d != axis]
    m = _along(delta.tensors["magnitude"], axis, v.dim())
    return Dense(m / torch.linalg.vector_norm(v, dim=over, keepdim=True) * v - w0, 1.0, tuple(w0.shape))


def ia3(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = l o W0 along outputs (axis 0) or inputs (axis 1). (IA)^3, arXiv 2205.05638."""
    axis = int(delta.config["axis"])
    if delta.tensors["l"].numel() != w0.shape[axis]:
        raise FormatError(f"ia3_l has {delta.tensors['l'].numel()} entries for {w0.shape[axis]} channels")
    return Dense((_along(delta.tensors["l"], axis, w0.dim()) - 1) * w0.double(), 1.0, tuple(w0.shape))


def ia3_bias(delta: NeedsBase, w0: Tensor, b0: Tensor) -> BaseFree | None:
    """b' = l o b where outputs are scaled; inputs leave the bias alone."""
    if int(delta.config["axis"]):
        return None
    return Dense((delta.tensors["l"].double().reshape(-1) - 1) * b0.double(), 1.0, tuple(b0.shape))


def hira(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 o (1 + B A). HiRA, ICLR 2025."""
    if delta.inner is None:
        raise FormatError("hira has no factors")
    return Dense(w0.double() * delta.inner.dense().reshape(w0.shape), 1.0, tuple(w0.shape))


def glora(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = W0 + W0 o A + B; a path is a product, a vector, a scalar or zero. GLoRA, arXiv 2306.07967."""
    w0 = w0.double()
    return Dense((w0 * _path(delta, "A") + _path(delta, "B")).expand_as(w0).contiguous(), 1.0, tuple(w0.shape))


def glora_bias(delta: NeedsBase, w0: Tensor, b0: Tensor) -> BaseFree | None:
    """b' = b + b o D + E + W0 C."""
    b0, c = b0.double(), _path(delta, "C")
    mixed = (w0.double() @ c).reshape(-1) if isinstance(c, Tensor) else 0.0
    return Dense((b0 * _path(delta, "D") + _path(delta, "E") + mixed).expand_as(b0).contiguous(), 1.0, tuple(b0.shape))


def peanut(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW^T = scaling * h B^T, h a relu network with mirrored skips over the columns of W0. PEANuT, arXiv 2410.01870."""
    t = {k: v.double() for k, v in delta.tensors.items()}
    depth = int(delta.config["depth"])
    h, skips = torch.relu(w0.double().mT @ t["A"].mT), []  # (in, r)
    for i in range(depth):
        skips.append(h)
        h = torch.relu(h @ t[f"encoders.{i}"].mT)
    for i in range(depth):
        h = torch.relu(h @ t[f"decoders.{i}"].mT) + skips[depth - 1 - i]
    return Dense((h @ t["B"].mT).mT.contiguous(), float(delta.config["scaling"]), tuple(w0.shape))


def miss_bat(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW[k, :, j, :] = W0[k, :, j, :] B_k + B_k on the (out/r, r, in/r, r) view of W0. Bone "bat", arXiv 2409.15371."""
    block = delta.tensors["block"].double()  # (out/r, r, r)
    groups, r, _ = block.shape
    out, n = w0.shape
    if out != groups * r or n % r:
        raise FormatError(f"miss_block {tuple(block.shape)} does not tile a {out} x {n} weight")
    w = w0.double().reshape(groups, r, n // r, r)
    dw = torch.einsum("kajb,kbc->kajc", w, block) + block[:, :, None, :]
    return Dense(dw.reshape(out, n), 1.0, (out, n))


def _along(v: Tensor, axis: int, dims: int) -> Tensor:
    return v.double().reshape([-1 if d == axis else 1 for d in range(dims)])


def _path(delta: NeedsBase, name: str) -> Tensor | float:
    t = delta.tensors
    if f"{name}.Xd" in t:
        return t[f"{name}.Xd"].double() @ t[f"{name}.Xu"].double()
    return t[f"{name}.X"].double() if f"{name}.X" in t else 0.0
