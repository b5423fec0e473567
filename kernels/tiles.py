"""Device functions that every Triton kernel here is made of: tiles of weights, of sign planes, and the flags between them.

Import this module only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.lookup import INT4_BF16, INT4_FP16, NF4_BF16, NF4_FP16

PLAIN = tl.constexpr(0)
NF4 = tl.constexpr(1)
INT4 = tl.constexpr(2)
ASM_NF4_FP16 = tl.constexpr(NF4_FP16)
ASM_NF4_BF16 = tl.constexpr(NF4_BF16)
ASM_INT4_FP16 = tl.constexpr(INT4_FP16)
ASM_INT4_BF16 = tl.constexpr(INT4_BF16)


@triton.jit
def dot(a, b, acc, DT: tl.constexpr):
    """acc + a @ b. DT float32 is exact ("ieee"): the GPU default would round to tf32.

    Launchers pass DT = float32 in Triton's interpreter, whose bf16 products are wrong (see `launch.compute_type`).
    """
    if DT == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def halves(codes, table, CODE: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """The 16-entry table's values for the high and for the low nibbles of a byte tile."""
    if ASM:
        # tl.inline_asm_elementwise takes literal dtypes only, not a constexpr parameter
        if DT == tl.float16:
            asm: tl.constexpr = ASM_NF4_FP16 if CODE == NF4 else ASM_INT4_FP16
            return tl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            asm: tl.constexpr = ASM_NF4_BF16 if CODE == NF4 else ASM_INT4_BF16
            return tl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        high = tl.load(table + (codes >> 4).to(tl.int32)).to(DT)
        low = tl.load(table + (codes & 15).to(tl.int32)).to(DT)
        return high, low


@triton.jit
def base_tile(
    x, w, scales, table, rows, cols, k_lo, M, x_row,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr,
    CODE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """(BN, BM) float32: dequant(w)[cols, k_lo : k_lo + KS] @ x[rows, same]^T.

    Columns past N read column 0: a store masks them, and the loads need no mask. KP is K rounded up to the 64 columns
    of a scale; EVEN says that no split reaches past KP.
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
        w_rows = w + safe[:, None] * (KP // 2)
        s_rows = scales + safe * S_ROW
        x_rows = x + rows[:, None] * x_row
        for k in range(0, KS, BK):
            # BK / 64 scale blocks an iteration, unrolled: their loads are in flight together
            for sub in tl.static_range(0, BK, 64):
                kb = k_lo + k + sub
                ks = kb + tl.arange(0, 64)
                kh = kb // 2 + tl.arange(0, 32)
                if EVEN:
                    codes = tl.load(w_rows + kh[None, :])
                    scale = tl.load(s_rows + (kb // 64) * S_COL)
                else:
                    codes = tl.load(w_rows + kh[None, :], mask=kh[None, :] < KP // 2, other=0)
                    scale = tl.load(s_rows + (kb // 64) * S_COL, mask=safe * 0 + kb < KP, other=0.0)
                if EVEN and KP == K:
                    xt = tl.load(x_rows + ks[None, :], mask=rows[:, None] < M, other=0.0)
                else:
                    xt = tl.load(x_rows + ks[None, :], mask=(rows[:, None] < M) & (ks[None, :] < K), other=0.0)
                even, odd = tl.split(tl.reshape(xt.to(DT), (BM, 32, 2)))
                high, low = halves(codes, table, CODE, DT, ASM)
                factor = scale.to(DT)[:, None]
                acc = dot(high * factor, tl.trans(even), acc, DT)
                acc = dot(low * factor, tl.trans(odd), acc, DT)
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
