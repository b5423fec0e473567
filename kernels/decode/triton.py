"""One launch for a linear layer with its adapter: shrink programs run beside the base product and feed its epilogue."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.tiles import announce, arrive, base_tile, dot, dot_wide, enter, factor_tile, settle


@triton.jit
def decode_kernel(
    x,        # (M, K) rows x_row apart, any float dtype
    w,        # (N, K) float, or (N, KP / 4) int16 of four codes, the even column in a byte's high nibble
    scales,   # (N, KP / 64) float32 with strides S_ROW, S_COL; unread for plain weights
    table,    # (16,) float32 values of the codes; unread where ASM
    bias,     # (N,) float; unread unless BIAS
    gain,     # (N,) float32 factor of everything but the bias (DoRA); unread unless GAIN
    q,        # (TQ / 16, K) int16 words if PACKED, else (TQ, K) float
    p,        # (TP / 16, N) int16 words if PACKED, else (TP, N) float
    core,     # (TQ, TP) float32
    scale,    # multiplier of the adapter
    y,        # (M, N) contiguous, dtype of x
    shrunk,   # (SLICES, BM, TP) float32 scratch: each slice of K sends its share of (x q^T) core
    partial,  # (tiles, SPLIT, BN, BM) float32 scratch of the split base product
    flags,    # (1 + tiles,) int32, zero before and after: the gate of the slices, splits arrived for each tile
    M, x_row,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr,
    CODE: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, TQ: tl.constexpr, TP: tl.constexpr,
    PACKED: tl.constexpr,
    SLICES: tl.constexpr, KQ: tl.constexpr, SPLIT: tl.constexpr, KS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y = gain * (x dequant(w)^T + scale * ((x q^T) core) p^T) + bias for M <= BM.

    Programs 0 .. SLICES-1 shrink KQ columns of x each; program SLICES + tile * SPLIT + split multiplies KS columns of
    BN rows of w. The last split to finish a tile adds the parts in split order, so the result does not depend on who
    was last, passes the gate of the slices (long done), and expands. TP = 0 is the base alone.
    """
    pid = tl.program_id(0)
    rows = tl.arange(0, BM)
    if pid < SLICES:
        if TP > 0:  # with no adapter there are no slices, and nothing of this is compiled
            WIDTH: tl.constexpr = min(TP, 64 if TQ < 128 else 32)
            h = tl.zeros((BM, TQ), dtype=tl.float32)
            for k in range(0, KQ, BQ):
                ks = pid * KQ + k + tl.arange(0, BQ)
                live = (rows[:, None] < M) & (ks[None, :] < K)
                xt = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=live, other=0.0)
                h = dot(xt.to(DT), factor_tile(q, ks, K, BQ, TQ, PACKED, SLICES * KQ == K, DT), h, DT)
            for first in tl.static_range(0, TP, WIDTH):  # in parts: a core of 256 x 256 would fill shared memory
                t = first + tl.arange(0, WIDTH)[None, :]
                c = tl.load(core + tl.arange(0, TQ)[:, None] * TP + t) * scale
                tl.store(shrunk + (pid * BM + rows[:, None]) * TP + t, dot_wide(h, c, DT))
            announce(flags)
    else:
        tile = (pid - SLICES) // SPLIT
        split = (pid - SLICES) % SPLIT
        cols = tile * BN + tl.arange(0, BN)
        if TP > 0:
            f = factor_tile(p, cols, N, BN, TP, PACKED, N % BN == 0, DT)  # early: the epilogue must not wait for memory
        acc = base_tile(
            x, w, scales, table, rows, cols, split * KS, M, x_row, N, K, KP, KS, S_ROW, S_COL, CODE, SPLIT * KS == KP,
            BM, BN, BK, DT, ASM, False,
        )  # fmt: skip
        here = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        last = True
        if SPLIT > 1:
            tl.store(partial + (tile * SPLIT + split) * (BN * BM) + here, acc, mask=rows[None, :] < M)
        if TP > 0:
            seen, arrived = enter(flags, flags + 1 + tile)
            last = arrived == SPLIT - 1
            settle(flags, seen, last, SLICES, ((N + BN - 1) // BN) * SPLIT)
        elif SPLIT > 1:
            last = arrive(flags + 1 + tile) == SPLIT - 1
        if last:
            if TP > 0:
                tl.store(flags + 1 + tile, 0)
                g = tl.zeros((TP, BM), dtype=tl.float32)
                for s in tl.static_range(SLICES):
                    at = (s * BM + rows[None, :]) * TP + tl.arange(0, TP)[:, None]
                    g += tl.load(shrunk + at, cache_modifier=".cg")
            if SPLIT > 1:
                tl.debug_barrier()
                acc = tl.zeros((BN, BM), dtype=tl.float32)
                for s in tl.static_range(SPLIT):
                    acc += tl.load(partial + (tile * SPLIT + s) * (BN * BM) + here, mask=rows[None, :] < M, other=0.0,
                                   cache_modifier=".cg")  # fmt: skip
                tl.store(flags + 1 + tile, 0)
            if TP > 0:
                acc = dot(f, g.to(DT), acc, DT)
            if GAIN:
                acc *= tl.load(gain + cols, mask=cols < N, other=0.0)[:, None]
            if BIAS:
                acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
            out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
            tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))
