"""Specification of a linear layer whose rows run through different adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.kernels.pool import Pool
from adaptc.kernels.resident import unpack
from adaptc.kernels.weight import Weight, unpack_weight


def linear_many(x: Tensor, weight: Weight, pool: Pool, slots: list[int], bias: Tensor | None) -> Tensor:
    """y[i] = x[i] w0^T + bias + scale[slots[i]] * dW[slots[i]] x[i]; slot -1 is the base alone. Rounds once."""
    wide = x.float()
    y = wide @ unpack_weight(weight).t()
    if bias is not None:
        y = y + bias.float()
    of = torch.tensor(slots, device=x.device)
    for slot in sorted(set(slots) - {-1}):
        p, core, q = unpack(pool.get(slot))
        mine = of == slot
        y[mine] += pool.scales[slot] * (((wide[mine] @ q.t()) @ core.t()) @ p.t())
    return y.to(x.dtype)
