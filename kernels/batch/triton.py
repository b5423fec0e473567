"""Many adapters in one batch: shrink each run of rows with its own adapter, expand in the base product's epilogue."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.batch.paged import expand_rows, expand_runs, row_words, shrink_row, shrink_run
from adaptc.kernels.prefill.triton import sort_columns
from adaptc.kernels.tiles import announce, base_tile, enter, settle


@triton.jit
def many_decode_kernel(
    x,            # (M, K) rows x_row apart
    w,            # (N, K) float, or (N, KP / 4) int16 of four codes
    scales,       # (N, KP / 64) float32 with strides S_ROW, S_COL
    lookup,       # (16,) float32 values of the codes; unread where ASM
    bias,         # (N,) float; unread unless BIAS
    pool,         # (pages, 512) int16
    pool32,       # the same memory, (pages, 256) float32
    table,        # (slots, 8) int32, see `pool`
    slot_scales,  # (slots,) float32
    pages,        # (slots, P_ROW) int32
    each,         # (M,) int32: the slot of every row, -1 for none
    y,            # (M, N) contiguous
    shrunk,       # (SLICES, M, 16 WIDE) float32 scratch
    partial,      # (tiles, SPLIT, BN, BM) float32 scratch
    flags,        # (1 + tiles,) int32, zero before and after
    M, x_row, P_ROW,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr, CODE: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr, KQ: tl.constexpr, SPLIT: tl.constexpr,
    KS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr,
    HALF: tl.constexpr, PLANES: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """y = x dequant(w)^T + bias + each row's own adapter, for M <= BM, in one launch (see `decode_kernel`)."""
    pid = tl.program_id(0)
    rows = tl.arange(0, BM)
    if pid < M * SLICES:
        shrink_row(x, pool, pool32, table, slot_scales, pages, each, shrunk, pid // SLICES, pid % SLICES, M, x_row,
                   P_ROW, K, WIDE, KQ, HALF, PLANES, PLAIN)  # fmt: skip
        announce(flags)
    else:
        tile = (pid - M * SLICES) // SPLIT
        split = (pid - M * SLICES) % SPLIT
        cols = tile * BN + tl.arange(0, BN)
        # the chain row -> slot -> table -> page -> words is walked before the product, not after it
        slots = tl.load(each + rows, mask=rows < M, other=-1)
        known = slots >= 0
        kind = tl.load(table + slots * 8, mask=known, other=0)
        words_p = tl.load(table + slots * 8 + 2, mask=known, other=0)
        at_p = tl.load(table + slots * 8 + 4, mask=known, other=0)
        words = row_words(pool, pages, slots, at_p, 0, N, tile * BN, BN, known & (kind == 0), P_ROW)
        acc = base_tile(
            x, w, scales, lookup, rows, cols, split * KS, M, x_row, N, K, KP, KS, S_ROW, S_COL, CODE, SPLIT * KS == KP,
            BM, BN, BK, DT, ASM, False,
        )  # fmt: skip
        here = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        if SPLIT > 1:
            tl.store(partial + (tile * SPLIT + split) * (BN * BM) + here, acc, mask=rows[None, :] < M)
        seen, arrived = enter(flags, flags + 1 + tile)
        settle(flags, seen, arrived == SPLIT - 1, M * SLICES, ((N + BN - 1) // BN) * SPLIT)
        if arrived == SPLIT - 1:
            tl.store(flags + 1 + tile, 0)
            if SPLIT > 1:
                acc = tl.zeros((BN, BM), dtype=tl.float32)
                for s in tl.static_range(SPLIT):
                    acc += tl.load(partial + (tile * SPLIT + s) * (BN * BM) + here, mask=rows[None, :] < M, other=0.0,
                                   cache_modifier=".cg")  # fmt: skip
            acc = expand_rows(acc, words, pool, pages, shrunk, slots, kind, words_p, at_p, rows, tile * BN, M, P_ROW,
                              N, WIDE, SLICES, BN, BM, HALF, PLANES, PLAIN)  # fmt: skip
            if BIAS:
                acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
            out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
            tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))


@triton.jit
def many_shrink_kernel(
    x, pool, pool32, table, slot_scales, pages,  # as in many_decode_kernel
    runs,    # (R, 3) int32: slot, first row, one past the last
    shrunk,  # (SLICES, M, 16 WIDE) float32
    xs,  # (M, KP) copy of x in the order of the 4-bit products; unwritten unless SORT
    M, R, x_row, P_ROW,
    K: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, KQ: tl.constexpr, SORT: tl.constexpr, BM: tl.constexpr,
    BQ: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr, HALF: tl.constexpr, PLANES: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Programs (i, part): run i of R, then tiles of 64 rows to sort."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    if pid < R:
        shrink_run(x, pool, pool32, table, slot_scales, pages, runs, shrunk, pid, part, M, x_row, P_ROW, K, WIDE, KQ,
                   BM, BQ, DT, HALF, PLANES, PLAIN)  # fmt: skip
    elif SORT:
        rows = (pid - R) * 64 + tl.arange(0, 64)
        sort_columns(x, xs, rows, part * KQ, M, x_row, K, KP, KQ, ASM)


@triton.jit
def many_prefill_kernel(
    x, w, scales, lookup, bias, pool, table, pages, runs,  # as in many_decode_kernel; x sorted for 4-bit weights
    first,   # (tiles of 64 rows + 1,) int32: first run of each, and R
    y, shrunk,
    M, x_row, P_ROW,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr, CODE: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr, HALF: tl.constexpr, PLANES: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """One tile of BM x BN of the base product, then the runs that reach into its rows; BM is a multiple of 64."""
    tiles_m = tl.cdiv(M, BM)
    tile_m = tl.program_id(0) % tiles_m
    col0 = (tl.program_id(0) // tiles_m) * BN
    rows = tile_m * BM + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    KS: tl.constexpr = (KP + BK - 1) // BK * BK
    acc = base_tile(
        x, w, scales, lookup, rows, cols, 0, M, x_row, N, K, KP, KS, S_ROW, S_COL, CODE, KS == KP, BM, BN, BK, DT, ASM,
        CODE != 0,
    )  # fmt: skip
    end = tl.minimum((tile_m + 1) * (BM // 64), tl.cdiv(M, 64))
    acc = expand_runs(acc, pool, table, pages, runs, shrunk, tl.load(first + tile_m * (BM // 64)), tl.load(first + end),
                      rows, col0, M, P_ROW, N, WIDE, SLICES, BN, BM, DT, HALF, PLANES, PLAIN)  # fmt: skip
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))
