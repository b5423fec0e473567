"""Many rows: shrink once, then expand in the epilogue of the base product."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.tiles import base_tile, column_of, dot, dot_wide, factor_tile


@triton.jit
def sort_columns(
    x, xs, rows, k_lo, M, x_row, K: tl.constexpr, KP: tl.constexpr, KQ: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Copy KQ columns of x in the order in which the 4-bit products take them, so that their tiles are contiguous."""
    i = tl.arange(0, 64)
    inside = column_of(i % 16, ASM) + (i // 16) * (2 if ASM else 1)
    for k in range(0, KQ, 64):
        ks = k_lo + k + inside
        v = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=(rows[:, None] < M) & (ks[None, :] < K), other=0.0)
        to = k_lo + k + i
        tl.store(xs + rows[:, None].to(tl.int64) * KP + to[None, :], v, mask=(rows[:, None] < M) & (to[None, :] < KP))


@triton.jit
def shrink_kernel(
    x,       # (M, K) rows x_row apart
    q,       # (TQ / 16, K) int16 words if PACKED, else (TQ, K) float
    core,    # (TQ, TP) float32
    scale,   # multiplier of the adapter
    shrunk,  # (SLICES, M, TP) float32: each slice's share of scale * (x q^T) core
    xs,      # (M, KP) copy of x in the order of the 4-bit products; unwritten unless SORT
    M, x_row,
    K: tl.constexpr, KP: tl.constexpr, TQ: tl.constexpr, TP: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr,
    KQ: tl.constexpr, SORT: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program shrinks BM rows over KQ columns. TP = 0 only sorts."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k_lo = tl.program_id(1) * KQ
    if SORT:
        sort_columns(x, xs, rows, k_lo, M, x_row, K, KP, KQ, ASM)
    if TP > 0:
        h = tl.zeros((BM, TQ), dtype=tl.float32)
        for k in range(0, KQ, BQ):
            ks = k_lo + k + tl.arange(0, BQ)
            live = (rows[:, None] < M) & (ks[None, :] < K)
            xt = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=live, other=0.0)
            h = dot(xt.to(DT), factor_tile(q, ks, K, BQ, TQ, PACKED, SLICES * KQ == K, DT), h, DT)
        WIDTH: tl.constexpr = min(TP, 64 if TQ < 128 else 32)
        for first in tl.static_range(0, TP, WIDTH):  # in parts: a core of 256 x 256 would fill shared memory
            t = first + tl.arange(0, WIDTH)[None, :]
            c = tl.load(core + tl.arange(0, TQ)[:, None] * TP + t) * scale
            to = shrunk + (tl.program_id(1) * M + rows[:, None]) * TP + t
            tl.store(to, dot_wide(h, c, DT), mask=rows[:, None] < M)


@triton.jit
def prefill_kernel(
    x,       # (M, K) rows x_row apart; (M, KP) in sorted column order for 4-bit weights
    w,       # (N, K) float, or (N, KP / 4) int16 of four codes
    scales,  # (N, KP / 64) float32 with strides S_ROW, S_COL
    table,   # (16,) float32 values of the codes; unread where ASM
    bias,    # (N,) float; unread unless BIAS
    gain,    # (N,) float32 factor of everything but the bias (DoRA); unread unless GAIN
    p,       # (TP / 16, N) int16 words if PACKED, else (TP, N) float
    shrunk,  # (SLICES, M, TP) float32 from shrink_kernel
    y,       # (M, N) contiguous
    M, x_row,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr, CODE: tl.constexpr,
    BIAS: tl.constexpr, GAIN: tl.constexpr, TP: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y = gain * (x dequant(w)^T + shrunk p^T) + bias, one program a tile; rows run fastest, to share w."""
    tiles_m = tl.cdiv(M, BM)
    rows = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) // tiles_m) * BN + tl.arange(0, BN)
    KS: tl.constexpr = (KP + BK - 1) // BK * BK
    acc = base_tile(
        x, w, scales, table, rows, cols, 0, M, x_row, N, K, KP, KS, S_ROW, S_COL, CODE, KS == KP, BM, BN, BK, DT, ASM,
        CODE != 0,
    )  # fmt: skip
    if TP > 0:
        f = factor_tile(p, cols, N, BN, TP, PACKED, N % BN == 0, DT)
        at = rows[None, :] * TP + tl.arange(0, TP)[:, None]
        g = tl.zeros((TP, BM), dtype=tl.float32)
        for s in range(SLICES):
            g += tl.load(shrunk + s * M * TP + at, mask=rows[None, :] < M, other=0.0)
        acc = dot(f, g.to(DT), acc, DT)
    if GAIN:
        acc *= tl.load(gain + cols, mask=cols < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))
