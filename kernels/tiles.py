"""Device functions that every Triton kernel here is made of: weight tiles, plane tiles, flags between programs.

Import this module only where Triton is installed.
"""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.lookup import CONSTRAINTS, INT4_BF16, INT4_FP16, NF4_BF16, NF4_FP16

PLAIN = tl.constexpr(0)
NF4 = tl.constexpr(1)
ASM_CONSTRAINTS = tl.constexpr(CONSTRAINTS)
ASM_NF4_FP16 = tl.constexpr(NF4_FP16)
ASM_NF4_BF16 = tl.constexpr(NF4_BF16)
ASM_INT4_FP16 = tl.constexpr(INT4_FP16)
ASM_INT4_BF16 = tl.constexpr(INT4_BF16)


@triton.jit
def dot(a, b, acc, DT: tl.constexpr):
    """acc + a @ b. DT float32 is exact ("ieee"): the GPU default would round to tf32.

    Launchers pass DT = float32 in Triton's interpreter, whose bf16 products are wrong (see `launch.compute_type`).
    """
    if tl.float32 == DT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_wide(a, b, DT: tl.constexpr):
    """a @ b of float32 operands whose range half precision may not hold: tf32 (11 bits) unless DT is float32."""
    if tl.float32 == DT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def lookup(shorts, CODE: tl.constexpr, DT: tl.constexpr):
    """Four tiles of values from a tile of int16, four codes each, by byte permutes (see `lookup.py`).

    Two neighbouring int16 are one word of eight columns, and tile j has columns 2 j and 2 j + 1 of every word: `pack=2`
    hands the asm the pair in one register, and the results are already where a tensor core wants them.
    """
    # tl.inline_asm_elementwise takes literal dtypes only, not a constexpr parameter
    if tl.float16 == DT:
        asm: tl.constexpr = ASM_NF4_FP16 if CODE == NF4 else ASM_INT4_FP16
        return tl.inline_asm_elementwise(
            asm, ASM_CONSTRAINTS, [shorts], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        asm: tl.constexpr = ASM_NF4_BF16 if CODE == NF4 else ASM_INT4_BF16
        return tl.inline_asm_elementwise(
            asm,
            ASM_CONSTRAINTS,
            [shorts],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def gather(shorts, table, COLUMN: tl.constexpr, DT: tl.constexpr):
    """The value of one of the four columns of each int16, loaded from a table of 16: `lookup` where there is no PTX."""
    return tl.load(table + ((shorts.to(tl.int32) >> (4 * (COLUMN ^ 1))) & 15)).to(DT)


@triton.jit
def piece(x_rows, ks, rows, M, K: tl.constexpr, WHOLE: tl.constexpr, DT: tl.constexpr):
    """(16, BM) of x^T at the columns ks."""
    if WHOLE:
        return tl.load(x_rows + ks[:, None], mask=rows[None, :] < M, other=0.0).to(DT)
    else:
        return tl.load(x_rows + ks[:, None], mask=(rows[None, :] < M) & (ks[:, None] < K), other=0.0).to(DT)


@triton.jit
def column_of(i, ASM: tl.constexpr):
    """The column, in its block of 64, of entry i of the first product; product j is `2 j` (PTX) or `j` columns on.

    PTX: two columns of each of eight words; else one column of each of sixteen int16.
    """
    if ASM:
        return (i // 2) * 8 + i % 2
    else:
        return i * 4


@triton.jit
def base_tile(
    x, w, scales, table, rows, cols, k_lo, M, x_row,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr,
    CODE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
    ASM: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """(BN, BM) float32: dequant(w)[cols, k_lo : k_lo + KS] @ x[rows, same]^T.

    Columns past N read column 0: a store masks them, and the loads need no mask. KP is K rounded up to the 64 columns
    of a scale; EVEN says that no split reaches past KP. SORTED says that the columns of x already stand in the order in
    which the products take them (`column_of`), KP to a row.
    """
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    safe = tl.where(cols < N, cols, 0).to(tl.int64)
    if CODE == PLAIN:
        w_rows = w + safe[:, None] * K
        x_rows = x + rows[None, :] * x_row
        for k in range(0, KS, BK):
            ks = k_lo + k + tl.arange(0, BK)
            if EVEN and KP == K:
                wt = tl.load(w_rows + ks[None, :])
                xt = tl.load(x_rows + ks[:, None], mask=rows[None, :] < M, other=0.0)
            else:
                wt = tl.load(w_rows + ks[None, :], mask=ks[None, :] < K, other=0.0)
                xt = tl.load(x_rows + ks[:, None], mask=(rows[None, :] < M) & (ks[:, None] < K), other=0.0)
            acc = dot(wt.to(DT), xt.to(DT), acc, DT)
    else:
        w_rows = w + safe[:, None] * (KP // 4)
        s_rows = scales + safe * S_ROW
        x_rows = x + rows[None, :] * x_row
        i = tl.arange(0, 16)
        inside = i if SORTED else column_of(i, ASM)
        step: tl.constexpr = 16 if SORTED else (2 if ASM else 1)
        for k in range(0, KS, BK):
            # BK / 64 scale blocks an iteration, unrolled: their loads are in flight together
            for sub in tl.static_range(0, BK, 64):
                kb = k_lo + k + sub
                kw = kb // 4 + i
                if EVEN:
                    shorts = tl.load(w_rows + kw[None, :])
                    scale = tl.load(s_rows + (kb // 64) * S_COL).to(DT)
                else:
                    shorts = tl.load(w_rows + kw[None, :], mask=kw[None, :] < KP // 4, other=0)
                    scale = tl.load(s_rows + (kb // 64) * S_COL, mask=safe * 0 + kb < KP, other=0.0).to(DT)
                if ASM:
                    c0, c1, c2, c3 = lookup(shorts, CODE, DT)
                else:
                    c0, c1 = gather(shorts, table, 0, DT), gather(shorts, table, 1, DT)
                    c2, c3 = gather(shorts, table, 2, DT), gather(shorts, table, 3, DT)
                factor = scale[:, None]
                at = kb + inside
                acc = dot(
                    c0 * factor,
                    piece(x_rows, at, rows, M, KP if SORTED else K, EVEN and (SORTED or KP == K), DT),
                    acc,
                    DT,
                )
                acc = dot(
                    c1 * factor,
                    piece(x_rows, at + step, rows, M, KP if SORTED else K, EVEN and (SORTED or KP == K), DT),
                    acc,
                    DT,
                )
                acc = dot(
                    c2 * factor,
                    piece(x_rows, at + 2 * step, rows, M, KP if SORTED else K, EVEN and (SORTED or KP == K), DT),
                    acc,
                    DT,
                )
                acc = dot(
                    c3 * factor,
                    piece(x_rows, at + 3 * step, rows, M, KP if SORTED else K, EVEN and (SORTED or KP == K), DT),
                    acc,
                    DT,
                )
    return acc


@triton.jit
def signs(words, BX: tl.constexpr, W: tl.constexpr, DT: tl.constexpr):
    """(BX, 16 W) of -1 and +1 from (BX, W) words, bit t of word w at column 16 w + t."""
    bits = (words.to(tl.int32)[:, :, None] >> tl.arange(0, 16)[None, None, :]) & 1
    return tl.reshape(tl.where(bits != 0, 1.0, -1.0).to(DT), (BX, 16 * W))


@triton.jit
def factor_tile(
    f, at, LEN: tl.constexpr, BX: tl.constexpr, T: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """(BX, T) slice of a factor stored as T rows (or T / 16 rows of words) of LEN, at positions `at` (BX)."""
    if PACKED:
        W: tl.constexpr = T // 16
        offs = tl.arange(0, W)[None, :] * LEN + at[:, None]
        if EVEN:
            words = tl.load(f + offs)
        else:
            words = tl.load(f + offs, mask=at[:, None] < LEN, other=0)
        return signs(words, BX, W, DT)
    else:
        offs = tl.arange(0, T)[None, :] * LEN + at[:, None]
        if EVEN:
            return tl.load(f + offs).to(DT)
        else:
            return tl.load(f + offs, mask=at[:, None] < LEN, other=0.0).to(DT)


@triton.jit
def arrive(counter):
    """Publish this program's stores and return how many programs had arrived before it."""
    tl.debug_barrier()  # every thread has stored before one of them announces it
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(counter, count):
    """Spin until `count` programs have arrived.

    Only programs with higher ids wait on programs with lower ids, which the hardware starts first: no deadlock.
    """
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def announce(gate):
    """Count this program among the producers of a gate: they live in the high half of its word."""
    tl.debug_barrier()
    tl.atomic_add(gate, 65536, sem="acq_rel", scope="gpu")


@triton.jit
def enter(gate, counter):
    """Count this program among the consumers of a gate (low half) and on a counter; return what both held before.

    One instruction for two addresses, so that the two round trips overlap; `settle` must follow.
    """
    tl.debug_barrier()  # every thread has stored before one of them announces it
    pair = tl.arange(0, 2)
    old = tl.atomic_add(tl.where(pair == 0, gate, counter), tl.full((2,), 1, tl.int32), sem="acq_rel", scope="gpu")
    return tl.sum(tl.where(pair == 0, old, 0), axis=0), tl.sum(tl.where(pair == 1, old, 0), axis=0)


@triton.jit
def settle(gate, seen, needed, producers, consumers):
    """Where `needed`, spin until every producer has announced; the last consumer to have entered zeroes the gate.

    It does so only once all producers have come, so a consumer that still spins may read zero, and only then: its own
    count keeps the word above zero before.
    """
    final = seen % 65536 == consumers - 1
    if needed | final:
        while (seen // 65536 < producers) & (seen >= 0):
            seen = tl.atomic_add(gate, 0, sem="acquire", scope="gpu")
            seen = tl.where(seen == 0, -1, seen)
        if final:
            tl.atomic_xchg(gate, 0, sem="release", scope="gpu")
        tl.debug_barrier()
