"""Random adapters and weights for the kernel tests, and the layer in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.kernels.resident import Resident, pack_plain, pack_planes, unpack
from adaptc.kernels.weight import Weight, pack_weight, plain_weight, unpack_weight


def planes(m: int, n: int, bits: list[int]) -> Resident:
    """Return random sign planes, directions of the given widths."""
    p = torch.stack([2 * torch.randint(0, 1 << b, (m,)) - (1 << b) + 1 for b in bits], 1)
    q = torch.stack([2 * torch.randint(0, 1 << b, (n,)) - (1 << b) + 1 for b in bits], 0)
    core = torch.randn(len(bits), len(bits)) / n**0.5
    return pack_planes(p, q, core, bits, bits, torch.rand(len(bits)), torch.rand(len(bits)))


def plain(m: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> Resident:
    """Return random plain factors."""
    return pack_plain(torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5, torch.randn(rank, rank), dtype)


def base(m: int, n: int, code: str) -> Weight:
    """Return a random base weight."""
    dense = torch.randn(m, n) / n**0.5
    return plain_weight(dense) if code == "plain" else pack_weight(dense, code)  # type: ignore[arg-type]


def exact(
    x: Tensor, w: Weight, a: Resident | None, scale: float, bias: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """Return the layer in float64 from dense matrices."""
    dense = unpack_weight(w).double()
    if a is not None:
        p, core, q = (t.double() for t in unpack(a))
        dense = dense + scale * p @ core @ q
    y = x.double() @ dense.t()
    y = y if gain is None else y * gain.double()
    return y if bias is None else y + bias.double()
