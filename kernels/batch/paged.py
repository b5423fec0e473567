"""Device functions of batches with many adapters: factors found through page tables, rows through their slots."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.tiles import dot, dot_wide, signs

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
                    seen = live[:, None] & (ks[None, :] < K)
                    xt = tl.load(x + rows[:, None] * x_row + ks[None, :], mask=seen, other=0.0)
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
            kind, words_p = tl.load(table + slot * 8), tl.load(table + slot * 8 + 2)
            at_p = tl.load(table + slot * 8 + 4)
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
    listed = pages + slots.to(tl.int64) * P_ROW
    page = tl.load(listed + at + word * each + col0 // PAGE, mask=live, other=0).to(tl.int64)
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
