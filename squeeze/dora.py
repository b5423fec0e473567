"""DoRA beside truncation: which magnitude goes with a shorter direction."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adaptc.delta import NeedsBase
from adaptc.passes import Change


def best_magnitude(before: NeedsBase, after: NeedsBase, w0: Tensor) -> Change:
    """Return `after` with the better of two magnitudes, by measured error of the adapted weight.

    W' = m o V / ||V||_row with V = W0 + dW. Candidates for the truncated direction V_k: m itself, and
    m' = m ||V_k|| / ||V||, which leaves the error m/||V|| o (dW - dW_k). Neither wins always, so both are measured as
    ||W'_k - W'|| / ||W' - W0||. Forms dense weights of this one layer in float64; only called when a base is given.
    """
    w0 = w0.double()
    target = before.resolve(w0).dense()
    size = float(target.norm())
    v, v_k = (norms(w0 + d.inner.dense(), before) for d in (before, after) if d.inner is not None)
    m = before.tensors["magnitude"]
    scaled = (m.double().flatten() * v_k / v).to(m.dtype).reshape(m.shape)
    rescaled = replace(after, tensors={**after.tensors, "magnitude": scaled})
    tried = [(after, "magnitude kept"), (rescaled, "magnitude rescaled to the truncated direction")]
    errors = [float((c.resolve(w0).dense() - target).norm()) / size if size else 0.0 for c, _ in tried]
    best = int(errors[1] < errors[0])
    return Change(tried[best][0], errors[best], tried[best][1])


def norms(v: Tensor, delta: NeedsBase) -> Tensor:
    """Return ||v|| over every dim but 0 (or but 1 for an embedding, config axis 1), float64, shape (dim,)."""
    axis = int(delta.config.get("axis", 0))
    size: Tensor = torch.linalg.vector_norm(v, dim=[d for d in range(v.dim()) if d != axis])
    return size
