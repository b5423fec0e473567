"""Walsh-Hadamard transform of the activations fused with a sparse spectral delta: y += s * F (U x)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels import sparse
from adaptc.kernels.device import backend, scratch
from adaptc.kernels.sparse import Rows
from adaptc.kernels.walsh import naive
from adaptc.quant.walsh import sylvester

MAX_LENGTH = 1 << 14


def transform(x: Tensor, had: Tensor, length: int) -> Tensor:
    """U x row by row, float32, for x (M, n): U = I (x) (had (x) Sylvester(length)) / sqrt(order * length).

    `had` (order, order) of +-1 and `length`, a power of two, name the transform; n is a multiple of order * length.
    """
    _check(x.shape[1], had, length)
    if backend(x) == "triton":
        return launch(x, had, length, None, x, 0.0)
    return naive.transform(x, had, length) if backend(x) == "naive" else _transform(x, had, length)


def spectral(x: Tensor, had: Tensor, length: int, rows: Rows, y: Tensor, scale: float) -> Tensor:
    """Return y + scale * F (U x) for F sparse by rows; on a GPU y itself is added to and returned."""
    _check(x.shape[1], had, length)
    if backend(x) == "triton":
        launch(x, had, length, rows, y, scale)
        return y
    return sparse.side(transform(x, had, length), rows, y, scale)


def launch(x: Tensor, had: Tensor, length: int, rows: Rows | None, y: Tensor, scale: float) -> Tensor:
    """Run the kernel: adds to y, or with no coefficients returns the spectrum."""
    from adaptc.kernels.walsh.triton import walsh_kernel

    (m, k), order = x.shape, had.shape[0]
    spectrum = torch.empty(m, k, dtype=torch.float32, device=x.device)
    if m == 0:
        return spectrum
    x = x if x.stride(1) == 1 else x.contiguous()
    groups, n = k // (order * length), 0 if rows is None else rows.shape[0]
    slab = min(length, 128)
    bm = min(8, 1 << (m - 1).bit_length())
    programs = m * groups * order + (m * groups * (length // slab) if order > 1 else 0) + -(-m // bm) * -(-n // 16)
    half = torch.empty_like(spectrum) if order > 1 else spectrum
    room = scratch(x.device, 3, 0)
    walsh_kernel[(programs,)](
        x, had.float(), *((x, x, x) if rows is None else (rows.starts, rows.columns, rows.values)), y, half,
        spectrum, room.flags, scale, m, x.stride(0), (order * length) ** -0.5,
        K=k, N=n, GROUPS=groups, ORDER=order, PADDED=1 << (order - 1).bit_length(), LENGTH=length,
        LOG=length.bit_length() - 1, SLAB=slab, SLABS=length // slab, BM=bm, BN=16, BE=32,
        num_warps=8 if length > 4096 else 4,
    )  # fmt: skip
    return spectrum


def _transform(x: Tensor, had: Tensor, length: int) -> Tensor:
    """The same by products with small matrices, which a CPU does several times faster than butterflies."""
    order = had.shape[0]
    out = sylvester(x.float().reshape(-1, length), float(order * length) ** -0.5)
    return (had.float() @ out.reshape(-1, order, length) if order > 1 else out).reshape(x.shape)


def _check(n: int, had: Tensor, length: int) -> None:
    order = had.shape[0]
    if length < 1 or length & (length - 1) or length > MAX_LENGTH or n % (order * length):
        raise UnsupportedError(f"width {n} has no transform of order {order} times {length}")


__all__ = ["launch", "spectral", "transform"]
