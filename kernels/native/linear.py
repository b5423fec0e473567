"""The decode linear on a CPU: 4-bit base and sign planes natively, everything else by torch."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adaptc.kernels.native.expand import tabled
from adaptc.kernels.native.jit import ROWS, Native, native
from adaptc.kernels.resident import Resident, unpack_words
from adaptc.kernels.weight import BLOCK, Weight

MAX_ROWS = 16  # beyond, a dequantised block and a BLAS product are faster
THREADED = 1 << 21  # entries of a weight that are worth waking a second thread for


def linear(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None,
    scale: float,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain * (x w0^T + scale * dW x) + bias for x (M, n) on the CPU, computed in float32, rounded once."""
    wide = x.float().contiguous()
    y = base(wide, weight)
    if adapter is not None:
        y = add_adapter(wide, adapter, scale, y)
    if gain is not None:
        y = y * gain.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def base(x: Tensor, weight: Weight) -> Tensor:
    """x w0^T in float32 for x (M, n) float32 contiguous; rows of the result are a multiple of 16 floats apart."""
    m = weight.shape[0]
    y = torch.empty(x.shape[0], -(-m // 16) * 16, dtype=torch.float32)
    if weight.scales is None:
        torch.mm(x, weight.data.float().t(), out=y) if y.shape[1] == m else y[:, :m].copy_(x @ weight.data.float().t())
    elif x.shape[0] <= MAX_ROWS:
        _gemv(x, weight, y)
    else:
        _blocks(x, weight, y)
    return y[:, :m]


def add_adapter(x: Tensor, adapter: Resident, scale: float, y: Tensor) -> Tensor:
    """y + scale * dW x; in place where y's rows are a multiple of 16 floats apart, as `base` makes them."""
    ready: Ready | None = adapter.native
    if ready is None:
        if not adapter.packed:
            q, p = adapter.q.float(), adapter.p.float()
            return y.addmm_((x @ q.t()) @ adapter.core, p, alpha=scale)
        ready = prepare(adapter)
    ldy, _ = y.stride()  # every call into torch costs a tenth of a microsecond, some of them four
    if ldy % 16 or ldy < ready.width:
        room = torch.zeros(x.shape[0], ready.width)
        return y + add_adapter(x, adapter, scale, room)[:, : adapter.shape[0]]
    ready.call(ready.address, x.data_ptr(), y.data_ptr(), scale, x.shape[0], x.stride()[0], ldy)
    return y


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """What one adapter's native call needs besides x and y: the function, and a block of pointers and sizes.

    signs: p for 16 outputs at a time, by nibbles or by words as the target reads them. `width` is ceil(m / 16) * 16.
    """

    call: Any
    address: int
    width: int
    signs: Tensor
    block: Any  # owns the memory at `address`


def prepare(adapter: Resident) -> Ready:
    """Lay a packed adapter out for the native call, once: kept with the adapter."""
    code = native()
    tp, m = adapter.core.shape[1], adapter.shape[0]
    groups = -(-m // 16)
    bits = torch.zeros(tp, groups * 16, dtype=torch.int32)
    bits[:, :m] = unpack_words(adapter.p) > 0
    signs = (nibbles if tabled(code.target) else words)(bits)
    block = (ctypes.c_int64 * 7)(
        adapter.q.data_ptr(), adapter.core.data_ptr(), signs.data_ptr(),
        adapter.shape[1], adapter.core.shape[0], tp, groups,
    )  # fmt: skip
    ready = Ready(code.adapter, ctypes.addressof(block), groups * 16, signs, block)
    object.__setattr__(adapter, "native", ready)
    return ready


def words(bits: Tensor) -> Tensor:
    """Lay bits (tp, 16 j) out as (j, tp) int16: bit i is output i of the sixteen."""
    by_group = bits.view(bits.shape[0], -1, 16)
    return (by_group << torch.arange(16, dtype=torch.int32)).sum(-1).to(torch.int16).t().contiguous()


def nibbles(bits: Tensor) -> Tensor:
    """Lay bits (tp, 16 j) out as (j, tp / 8, 16) bytes: bit b is rank 8 k + b of one output."""
    tp, wide = bits.shape
    by_rank = bits.view(tp // 8, 8, wide // 16, 16) << torch.arange(8, dtype=torch.int32)[:, None, None]
    return by_rank.sum(1).to(torch.uint8).permute(1, 0, 2).contiguous()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="adaptc-gemv")


def _gemv(x: Tensor, weight: Weight, y: Tensor) -> None:
    """Multiply up to MAX_ROWS rows, at most four to one decoding of the weight, outputs shared out to threads."""
    (rows, n), m = x.shape, weight.shape[0]
    assert weight.scales is not None
    scales = weight.scales.contiguous()
    half = weight.data.shape[1]
    if n < 2 * half:
        x = torch.nn.functional.pad(x, (0, 2 * half - n))
    halves = x.view(rows, half, 2).permute(2, 0, 1).contiguous()  # even columns, odd columns
    code = native()
    workers = min(torch.get_num_threads(), 1 if m * n < THREADED else m)
    cuts = [m * i // workers for i in range(workers + 1)]

    def work(lo: int, hi: int) -> None:
        for first in range(0, rows, ROWS[-1]):
            count = min(ROWS[-1], rows - first)
            code.gemv[weight.code, count](
                halves[0, first].data_ptr(), halves[1, first].data_ptr(), weight.data.data_ptr(), scales.data_ptr(),
                y[first].data_ptr(), half // 32, half, y.stride(0), lo, hi,
            )  # fmt: skip

    others = [_pool().submit(work, lo, hi) for lo, hi in pairwise(cuts[1:])]
    work(cuts[0], cuts[1])
    for other in others:
        other.result()


def _blocks(x: Tensor, weight: Weight, y: Tensor, rows: int = 512) -> None:
    """Multiply many rows: dequantise 512 rows of the weight at a time, then one BLAS product each."""
    n, m = x.shape[1], weight.shape[0]
    assert weight.scales is not None
    scales = weight.scales.contiguous()
    half = weight.data.shape[1]
    room = torch.empty(min(rows, m), 2 * half, dtype=torch.float32)
    code = native()
    for start in range(0, m, rows):
        count = min(rows, m - start)
        cells = count * (2 * half // BLOCK)
        code.dequant[weight.code](weight.data[start].data_ptr(), scales[start].data_ptr(), room.data_ptr(), cells)
        y[:, start : start + count] = x @ room[:count, :n].t()


__all__ = ["MAX_ROWS", "Native", "add_adapter", "base", "linear", "prepare"]
