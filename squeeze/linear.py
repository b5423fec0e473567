"""linear: A's and B's added apart, as PEFT's "linear" does."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze.method import Method, Pair, Task, in_factors


def merge(task: Task) -> Pair:
    """Return b = sum_t sqrt|w_t s_t| B_t, a = sum_t +-sqrt|w_t s_t| A_t, in factor space.

    The product holds every cross term B_i A_j and is not the weighted sum of deltas (measured: relative error about 1
    for independent inputs). Here for parity with PEFT's add_weighted_adapter("linear"). When not to use it: almost
    always; `exact` is what the name promises. Only inputs trained from one initialisation survive it.
    """
    return in_factors(add, task)


def add(x: Tensor, v: Tensor, task: Task, side: int) -> Tensor:
    """Return sum_t v_t x_t for x (T, ...)."""
    return torch.einsum("t,t...->...", v, x)


METHOD = Method(
    name="linear", run=merge, space="factors, A and B apart (PEFT parity)",
    exact="not the weighted sum: cross terms B_i A_j stay in",
    paper="PEFT add_weighted_adapter", avoid="almost always: exact is what this name promises",
)
