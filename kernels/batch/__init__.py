"""Many adapters in one batch, decode and prefill, from one pool of pages."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError, UsageError
from adaptc.kernels.batch import naive
from adaptc.kernels.decode import CODES, MAX_ROWS, codes, lookup_table, plan
from adaptc.kernels.device import backend, compute_type, interpreting, permutes, scratch
from adaptc.kernels.pool import CHUNK, PAGE, PLAIN, PLANES, TILE, Batch, Pool, batch
from adaptc.kernels.prefill import tiles
from adaptc.kernels.weight import Weight


def linear_many(x: Tensor, weight: Weight, pool: Pool, rows: Batch, bias: Tensor | None = None) -> Tensor:
    """y = x w0^T + bias + each row's own adapter, x (M, n).

    Raises UsageError where the batch describes another number of rows, UnsupportedError where a slot's adapter has
    another shape than the weight.
    """
    if x.shape[0] != rows.rows:
        raise UsageError(f"activations have {x.shape[0]} rows, the batch describes {rows.rows}")
    for slot in rows.slots:
        if pool.shape(slot) != weight.shape:
            raise UnsupportedError(f"slot {slot} holds an adapter for {pool.shape(slot)}, the weight is {weight.shape}")
    if backend(x) == "triton":
        return launch(x, weight, pool, rows, bias)
    listed = [[slot] * (hi - lo) for slot, lo, hi in rows.runs.tolist()]
    return naive.linear_many(x, weight, pool, list(chain.from_iterable(listed)), bias)


def launch(x: Tensor, weight: Weight, pool: Pool, rows: Batch, bias: Tensor | None) -> Tensor:
    """Run the decode kernel for up to 64 rows, the two prefill kernels for more."""
    from adaptc.kernels.batch.triton import many_decode_kernel, many_prefill_kernel, many_shrink_kernel

    (m, k), n = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    scales = x if weight.scales is None else weight.scales
    padded = k if weight.scales is None else weight.data.shape[1] * 2
    sort, asm = weight.scales is not None, permutes(x) and weight.scales is not None
    count, wide = rows.runs.shape[0], 1 << (max(pool.widest, 1) - 1).bit_length()
    shared: dict[str, Any] = {
        "K": k, "KP": padded, "WIDE": wide, "DT": compute_type(x), "ASM": asm, "HALF": _half(pool),
        "PLANES": pool.kinds[PLANES] > 0 or pool.kinds[PLAIN] == 0, "PLAIN": pool.kinds[PLAIN] > 0,
    }  # fmt: skip
    base: dict[str, Any] = {
        "N": n, "S_ROW": scales.stride(0), "S_COL": scales.stride(1), "CODE": CODES[weight.code],
        "BIAS": bias is not None,
    }  # fmt: skip
    reads = (codes(weight), scales, lookup_table(weight, x.device), x if bias is None else bias)
    store = (pool.storage, pool.storage.view(torch.float32), pool.table, pool.scales, pool.pages)
    kq = PAGE * -(-k // (8 * PAGE))
    slices = -(-k // kq)
    if m <= MAX_ROWS:
        t = plan(m, n, k, weight.code)
        # four slices at most: every tile adds them up again for each of the 16 planes of a word
        kq = PAGE * -(-k // (4 * PAGE))
        slices = -(-k // kq)
        blocks, shrunk = -(-n // t.bn), slices * m * 16 * wide
        room = scratch(x.device, 1 + blocks, shrunk + blocks * t.split * t.bn * t.bm)
        many_decode_kernel[(m * slices + blocks * t.split,)](
            x, *reads, *store, rows.each, y, room.floats, room.floats[shrunk:], room.flags,
            m, x.stride(0), pool.pages.stride(0), **shared, **base, SLICES=slices, KQ=kq, SPLIT=t.split,
            KS=t.ks, BM=t.bm, BN=t.bn, BK=t.bk, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return y
    t2 = tiles(m, n, k, weight.code, x.dtype == torch.float32)
    bm = max(TILE, t2.bm)
    room_shrunk = torch.empty(slices, m, 16 * wide, dtype=torch.float32, device=x.device)
    sorted_x = torch.empty(m, padded, dtype=x.dtype, device=x.device) if sort else x
    many_shrink_kernel[(count + (-(-m // 64) if sort else 0), -(-padded // kq))](
        x, *store, rows.runs, room_shrunk, sorted_x, m, count, x.stride(0), pool.pages.stride(0), **shared,
        KQ=kq, SORT=sort, BM=CHUNK, BQ=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    many_prefill_kernel[(-(-m // bm) * -(-n // t2.bn),)](
        sorted_x, *reads, store[0], store[2], store[4], rows.runs, rows.first, y, room_shrunk,
        m, sorted_x.stride(0), pool.pages.stride(0), **shared, **base, SLICES=slices, BM=bm, BN=t2.bn, BK=t2.bk,
        num_warps=t2.warps, num_stages=t2.stages,
    )  # fmt: skip
    return y


def _half(pool: Pool) -> Any:
    """Return the Triton type of the pool's plain factors."""
    import triton.language as tl

    return tl.float16 if pool.dtype == torch.float16 else tl.bfloat16


__all__ = ["Batch", "Pool", "batch", "interpreting", "launch", "linear_many"]
