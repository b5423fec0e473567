"""Many adapters in one batch: shrink each run of rows with its own adapter, expand in the base product's epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.prefill.triton import sort_columns
from adaptc.kernels.tiles import announce, base_tile, dot, dot_wide, enter, settle, signs

PAGE = tl.constexpr(512)


@triton.jit
def paged_tile(
    pool, listed, at, kind, word, length: tl.constexpr, pos, inside, BX: tl.constexpr, HALF: tl.constexpr,
    PLANES: tl.constexpr, PLAIN: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """(BX, 16) of one word of a factor, at positions `pos` (BX consecutive ones within one page)."""
    each: tl.constexpr = (length + 511) // 512
    leaf = pos // PAGE
    if PLANES and not PLAIN:
        page = tl.load(listed + at + word * each + leaf).to(tl.int64)
        words = tl.load(pool + page * PAGE + inside)
        tile = signs(words[:, None], BX, 1, DT)
    elif PLAIN and not PLANES:
        many = tl.load(listed + at + (word * 16 + tl.arange(0, 16)) * each + leaf).to(tl.int64)
        tile = tl.load(pool + many[None, :] * PAGE + inside[:, None]).to(HALF, bitcast=True).to(DT)
    else:
        if kind == 0:
            page = tl.load(listed + at + word * each + leaf).to(tl.int64)
            words = tl.load(pool + page * PAGE + inside)
            tile = signs(words[:, None], BX, 1, DT)
        else:
            many = tl.load(listed + at + (word * 16 + tl.arange(0, 16)) * each + leaf).to(tl.int64)
            tile = tl.load(pool + many[None, :] * PAGE + inside[:, None]).to(HALF, bitcast=True).to(DT)
    return tile


@triton.jit
def shrink_run(
    x, pool, pool32, table, slot_scales, pages, runs, shrunk, run, part, M, x_row, P_ROW,
    K: tl.constexpr, WIDE: tl.constexpr, KQ: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, DT: tl.constexpr,
    HALF: tl.constexpr, PLANES: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Write slice `part` of scale * (x q^T) core for the rows of one run, (part, row, plane) with rows M apart."""
    slot = tl.load(runs + run * 3)
    lo, hi = tl.load(runs + run * 3 + 1), tl.load(runs + run * 3 + 2)
    if slot >= 0:
        rows = lo + tl.arange(0, BM)
        live = rows < hi
        kind, words_q, words_p = tl.load(table + slot * 8), tl.load(table + slot * 8 + 1), tl.load(table + slot * 8 + 2)
        at_q, at_core = tl.load(table + slot * 8 + 3), tl.load(table + slot * 8 + 5)
        scale = tl.load(slot_scales + slot)
        listed = pages + slot.to(tl.int64) * P_ROW
        t = tl.arange(0, 16)
        word = 0
        while word < words_q:
            h = tl.zeros((BM, 16), dtype=tl.float32)
            for k in range(0, KQ, BQ):
                k0 = part * KQ + k
                if k0 < K:
                    ks = k0 + tl.arange(0, BQ)
                    xt = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=live[:, None] & (ks[None, :] < K), other=0.0)
                    inside = k0 % PAGE + tl.arange(0, BQ)
                    f = paged_tile(pool, listed, at_q, kind, word, K, k0, inside, BQ, HALF, PLANES, PLAIN, DT)
                    h = dot(xt.to(DT), f, h, DT)
            out = 0
            while out < words_p:
                page = tl.load(listed + at_core + word * words_p + out).to(tl.int64)
                c = tl.load(pool32 + page * (PAGE // 2) + t[:, None] * 16 + t[None, :]) * scale
                g = dot_wide(h, c, DT)
                to = shrunk + (part * M + rows[:, None]) * (16 * WIDE) + out * 16 + t[None, :]
                if word > 0:
                    g += tl.load(to, mask=live[:, None], other=0.0)
                    tl.debug_barrier()  # the layouts of load and store may differ
                tl.store(to, g, mask=live[:, None])
                out += 1
            tl.debug_barrier()
            word += 1


@triton.jit
def expand_runs(
    acc, pool, table, pages, runs, shrunk, first, last, rows, col0, M, P_ROW,
    N: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, DT: tl.constexpr,
    HALF: tl.constexpr, PLANES: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) + p g for the runs first .. last-1, each on its own rows only."""
    t = tl.arange(0, 16)
    inside = col0 % PAGE + tl.arange(0, BN)
    run = first
    while run < last:
        slot = tl.load(runs + run * 3)
        if slot >= 0:
            lo, hi = tl.load(runs + run * 3 + 1), tl.load(runs + run * 3 + 2)
            live = (rows >= lo) & (rows < hi)
            kind, words_p, at_p = tl.load(table + slot * 8), tl.load(table + slot * 8 + 2), tl.load(table + slot * 8 + 4)
            listed = pages + slot.to(tl.int64) * P_ROW
            word = 0
            while word < words_p:
                f = paged_tile(pool, listed, at_p, kind, word, N, col0, inside, BN, HALF, PLANES, PLAIN, DT)
                at = shrunk + rows[None, :] * (16 * WIDE) + word * 16 + t[:, None]
                g = tl.zeros((16, BM), dtype=tl.float32)
                for s in tl.static_range(SLICES):
                    g += tl.load(at + s * M * (16 * WIDE), mask=live[None, :], other=0.0, cache_modifier=".cg")
                acc = dot(f, g.to(DT), acc, DT)
                word += 1
        run += 1
    return acc


@triton.jit
def shrink_row(
    x, pool, pool32, table, slot_scales, pages, each, shrunk, row, part, M, x_row, P_ROW,
    K: tl.constexpr, WIDE: tl.constexpr, KQ: tl.constexpr, HALF: tl.constexpr, PLANES: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """`shrink_run` for one row: a vector, so plain adds do it, a page of 512 columns at once."""
    slot = tl.load(each + row)
    if slot >= 0:
        kind, words_q, words_p = tl.load(table + slot * 8), tl.load(table + slot * 8 + 1), tl.load(table + slot * 8 + 2)
        at_q, at_core = tl.load(table + slot * 8 + 3), tl.load(table + slot * 8 + 5)
        scale = tl.load(slot_scales + slot)
        listed = pages + slot.to(tl.int64) * P_ROW
        t, i = tl.arange(0, 16), tl.arange(0, 512)
        word = 0
        while word < words_q:
            h = tl.zeros((16,), dtype=tl.float32)
            for k in tl.static_range(0, KQ, 512):
                k0 = part * KQ + k
                if k0 < K:
                    v = tl.load(x + row * x_row + k0 + i, mask=k0 + i < K, other=0.0).to(tl.float32)
                    f = paged_tile(pool, listed, at_q, kind, word, K, k0, i, 512, HALF, PLANES, PLAIN, tl.float32)
                    h += tl.sum(f * v[:, None], axis=0)
            out = 0
            while out < words_p:
                page = tl.load(listed + at_core + word * words_p + out).to(tl.int64)
                c = tl.load(pool32 + page * (PAGE // 2) + t[:, None] * 16 + t[None, :]) * scale
                g = tl.sum(c * h[:, None], axis=0)
                to = shrunk + (part * M + row) * (16 * WIDE) + out * 16 + t
                if word > 0:
                    g += tl.load(to)
                    tl.debug_barrier()  # the layouts of load and store may differ
                tl.store(to, g)
                out += 1
            tl.debug_barrier()
            word += 1


@triton.jit
def row_words(pool, pages, slots, at, word, length: tl.constexpr, col0, BN: tl.constexpr, live, P_ROW):
    """(BN, BM) words of p: each row of the batch reads its own adapter's page."""
    each: tl.constexpr = (length + 511) // 512
    page = tl.load(pages + slots.to(tl.int64) * P_ROW + at + word * each + col0 // PAGE, mask=live, other=0).to(tl.int64)
    inside = col0 % PAGE + tl.arange(0, BN)
    return tl.load(pool + page[None, :] * PAGE + inside[:, None], mask=live[None, :], other=0)


@triton.jit
def expand_rows(
    acc, words, pool, pages, shrunk, slots, kind, words_p, at_p, rows, col0, M, P_ROW,
    N: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
    PLANES: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) + p g with every row's own p, all rows at once; `words` are the words of plane group 0."""
    most = tl.max(words_p, axis=0)
    word = 0
    while word < most:
        live = word < words_p
        for t in tl.static_range(16):
            g = tl.zeros((BM,), dtype=tl.float32)
            for s in tl.static_range(SLICES):
                at = shrunk + (s * M + rows) * (16 * WIDE) + word * 16 + t
                g += tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
            value = tl.zeros((BN, BM), dtype=tl.float32)
            if PLANES:
                value = tl.where((words.to(tl.int32) >> t) & 1 != 0, 1.0, -1.0)
            if PLAIN:
                mine = live & (kind == 1)
                half = row_words(pool, pages, slots, at_p, word * 16 + t, N, col0, BN, mine, P_ROW)
                value = tl.where(mine[None, :], half.to(HALF, bitcast=True).to(tl.float32), value)
            acc += value * g[None, :]
        word += 1
        if PLANES:
            words = row_words(pool, pages, slots, at_p, word, N, col0, BN, (word < words_p) & (kind == 0), P_ROW)
    return acc


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
