"""What base-dependent deltas mean on given base weights: kind -> (delta, w0) -> W' - W0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, NeedsBase


def dora(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """W' = (m / ||V||) o V with V = W0 + dW; the norm runs over every dim but 0 (config axis 1: but 1).

    DoRA, arXiv 2402.09353. m: `magnitude`, (out,) in any broadcast shape.
    """
    if delta.inner is None:
        raise ValueError("dora without a direction")
    w0 = w0.double()
    v = w0 + delta.inner.dense()
    axis = int(delta.config.get("axis", 0))
    over = [d for d in range(v.dim()) if d != axis]
    m = delta.tensors["magnitude"].double().reshape([-1 if d == axis else 1 for d in range(v.dim())])
    return Dense(m / torch.linalg.vector_norm(v, dim=over, keepdim=True) * v - w0, 1.0, delta.shape)


RESOLVERS: dict[str, Callable[[NeedsBase, Tensor], BaseFree]] = {"dora": dora}
