"""The decode linear on a CPU: 4-bit base and sign planes natively, everything else by torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
    if not adapter.packed:
        q, p = adapter.q.float(), adapter.p.float()
        return y.addmm_((x @ q.t()) @ adapter.core, p, alpha=scale)
    (tq, tp), (m, n) = adapter.core.shape, adapter.shape
    groups, ldy = -(-m // 16), y.stride(0)
    room = y if ldy % 16 == 0 and ldy >= m else torch.zeros(x.shape[0], groups * 16)
    native().adapter(
        x.data_ptr(), adapter.q.data_ptr(), adapter.core.data_ptr(), masks(adapter).data_ptr(), room.data_ptr(), scale,
        x.shape[0], x.stride(0), n, tq, tp, room.stride(0), groups,
    )  # fmt: skip
    return y if room is y else y + room[:, :m]


_MASKS = WeakTensorKeyDictionary()


def masks(adapter: Resident) -> Tensor:
    """Return p as (ceil(m / 16), tp) int16, bit i for output 16 j + i; built on first use, kept with the adapter."""
    found: Tensor | None = _MASKS.get(adapter.p)  # type: ignore[no-untyped-call]
    if found is None:
        signs = unpack_words(adapter.p)  # (tp, m)
        padded = torch.zeros(signs.shape[0], -(-signs.shape[1] // 16) * 16)
        padded[:, : signs.shape[1]] = signs
        bits = (padded > 0).view(signs.shape[0], -1, 16).to(torch.int32)
        packed = (bits << torch.arange(16, dtype=torch.int32)).sum(-1).to(torch.int16)
        found = _MASKS[adapter.p] = packed.t().contiguous()
    return found


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


__all__ = ["MAX_ROWS", "Native", "add_adapter", "base", "linear", "masks"]
