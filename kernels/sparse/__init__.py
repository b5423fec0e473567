"""Sparse deltas: switch them into a weight and out again bit for bit, or run them beside it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels.device import FLOATS, backend
from adaptc.kernels.sparse import naive

BLOCK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A sparse (m, n) matrix by rows: starts (m + 1,) int32, columns (p,) int16 (n <= 32768) or int32, values (p,)."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this matrix must read."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes


def by_rows(index: Tensor, values: Tensor, shape: tuple[int, int]) -> Rows:
    """Lay out sorted flat positions (p,) and their values by rows."""
    m, n = shape
    starts = torch.searchsorted(index.long(), torch.arange(m + 1, device=index.device) * n).to(torch.int32)
    columns = (index.long() % n).to(torch.int16 if n <= 1 << 15 else torch.int32)
    return Rows(starts, columns, values.contiguous(), shape)


def overwrite(w: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """w[index] = values in place, unique flat positions; return what stood there.

    `overwrite(w, index, that)` restores the weight bit for bit; adding and subtracting a delta would not.
    Raises UnsupportedError for a weight that is not a contiguous float matrix.
    """
    _check(w)
    choice = backend(w)
    if choice == "triton":
        return exchange(w, index, values.to(w.dtype), 1.0, add=False)
    if choice == "native":  # index_copy_: torch's scatter_ is 20 to 50 times slower for bfloat16 on a CPU
        flat, where = w.view(-1), index.long()
        saved = flat.index_select(0, where)
        flat.index_copy_(0, where, values.to(w.dtype))
        return saved
    return naive.overwrite(w, index, values)


def shift(w: Tensor, index: Tensor, delta: Tensor, scale: float) -> Tensor:
    """w[index] += scale * delta in place, rounded once; return what stood there, for `overwrite` to restore."""
    _check(w)
    choice = backend(w)
    if choice == "triton":
        return exchange(w, index, delta, scale, add=True)
    if choice == "native":
        flat, where = w.view(-1), index.long()
        saved = flat.index_select(0, where)
        flat.index_copy_(0, where, torch.add(saved.float(), delta.float(), alpha=scale).to(w.dtype))
        return saved
    return naive.shift(w, index, delta, scale)


def side(x: Tensor, rows: Rows, y: Tensor, scale: float) -> Tensor:
    """Return y + scale * x S^T for x (M, n), y (M, m); on a GPU y itself is added to and returned."""
    choice = backend(x)
    if choice == "triton":
        return launch(x, rows, y, scale)
    if choice == "native":
        with warnings.catch_warnings():  # torch calls its sparse layouts a beta on first use
            warnings.simplefilter("ignore", UserWarning)
            matrix = torch.sparse_csr_tensor(rows.starts, rows.columns.int(), rows.values.float(), rows.shape)
        return (y.float() + scale * (matrix @ x.float().t()).t()).to(y.dtype)
    return naive.side(x, rows.starts, rows.columns, rows.values, y, scale)


def launch(x: Tensor, rows: Rows, y: Tensor, scale: float) -> Tensor:
    """Run the side kernel; adds to y."""
    from adaptc.kernels.sparse.triton import side_kernel

    m = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    bm = min(8, max(1, 1 << (m - 1).bit_length())) if m else 1
    if m:
        side_kernel[(-(-rows.shape[0] // 16), -(-m // bm))](
            x, rows.starts, rows.columns, rows.values, y, scale, m, x.stride(0), N=rows.shape[0], BM=bm, BN=16, BE=32
        )
    return y


def exchange(w: Tensor, index: Tensor, values: Tensor, scale: float, add: bool) -> Tensor:
    """Run the exchange kernel: values replace, or with `add` scale * values shifts; return what stood there."""
    from adaptc.kernels.sparse.triton import exchange_kernel

    saved = torch.empty(index.numel(), dtype=w.dtype, device=w.device)
    if index.numel():
        exchange_kernel[(-(-index.numel() // BLOCK),)](
            w, index, values, saved, scale, index.numel(), ADD=add, SAVE=True, BLOCK=BLOCK
        )
    return saved


def _check(w: Tensor) -> None:
    if w.dtype not in FLOATS or not w.is_contiguous():
        raise UnsupportedError(f"weight of dtype {w.dtype}, strides {w.stride()} cannot be overwritten in place")


__all__ = ["Rows", "by_rows", "exchange", "launch", "overwrite", "shift", "side"]
