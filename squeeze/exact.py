"""exact and cat: the weighted sum of deltas, cut to a rank or kept whole."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze.method import InCore, Method, Task


def entries(x: Tensor, task: Task) -> Tensor:
    """Return sum_t w_t x_t for x (T, ...)."""
    return torch.einsum("t,t...->...", task.w, x)


def merge(task: Task) -> InCore:
    """Return dW = sum_t w_t dW_t in the joint core; its truncation there is the optimal one (Eckart-Young).

    Negative weights subtract. Task arithmetic, arXiv 2212.04089. When not to use it: inputs that fight over the same
    directions cancel; compare them first.
    """
    return InCore(task.joint, task.joint.weighted(task.weights))


METHOD = Method(
    name="exact", run=merge, entries=entries, space="joint core",
    exact="the weighted sum, truncated optimally to the rank; exact when the rank is the sum of ranks",
    paper="Ilharco 2022, arXiv 2212.04089", avoid="tasks that conflict: what cancels is lost",
)
