"""DoRA on a GPU: row norms of w0 + s dW without forming dW, and the output composed in one pass."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.tiles import base_tile, dot_wide, factor_tile


@triton.jit
def norms_kernel(
    q,        # (TQ, K) the q factor as floats: here it plays the part of the activations
    w,        # (N, K) float, or (N, KP / 4) int16 of four codes
    scales,   # (N, KP / 64) float32 with strides S_ROW, S_COL
    table,    # (16,) float32 values of the codes; unread where ASM
    p,        # (TP / 16, N) int16 words if PACKED, else (TP, N) float
    core,     # (TQ, TP) float32
    gram,     # (TP, TP) float32: core^T q q^T core
    squares,  # (N,) float32: squared row norms of w0
    out,      # (N,) float32
    scale,    # multiplier of the adapter
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S_ROW: tl.constexpr, S_COL: tl.constexpr, CODE: tl.constexpr,
    TQ: tl.constexpr, TP: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """out_i^2 = squares_i + 2 s p_i . (w0 q^T core)_i + s^2 p_i gram p_i^T, one program BN rows."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    KS: tl.constexpr = (KP + BK - 1) // BK * BK
    u = base_tile(
        q, w, scales, table, tl.arange(0, TQ), cols, 0, TQ, K, N, K, KP, KS, S_ROW, S_COL, CODE, KS == KP, TQ, BN, BK,
        DT, ASM, False,
    )  # fmt: skip
    t = tl.arange(0, TP)
    c = tl.load(core + tl.arange(0, TQ)[:, None] * TP + t[None, :])
    g = tl.load(gram + t[:, None] * TP + t[None, :])
    f = factor_tile(p, cols, N, BN, TP, PACKED, N % BN == 0, tl.float32)
    cross = tl.sum(f * dot_wide(u, c, DT), axis=1)
    quad = tl.sum(f * dot_wide(f, g, DT), axis=1)
    total = tl.load(squares + cols, mask=cols < N, other=0.0) + 2 * scale * cross + scale * scale * quad
    tl.store(out + cols, tl.sqrt(tl.maximum(total, 0.0)), mask=cols < N)


@triton.jit
def compose_kernel(
    base,   # (M, N) contiguous: x w0^T + bias
    delta,  # (M, N) contiguous: x dW^T
    gain,   # (N,) float32 magnitude / norm
    bias,   # (N,) float; unread unless BIAS
    out,    # (M, N) contiguous; may be base
    scale,  # multiplier of the delta
    M, N: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = gain * (base - bias + scale * delta) + bias; every element is read once and written once."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    v = tl.load(base + at, mask=live, other=0.0).to(tl.float32)
    d = tl.load(delta + at, mask=live, other=0.0).to(tl.float32)
    g = tl.load(gain + cols, mask=cols < N, other=0.0)[None, :]
    if BIAS:
        b = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        v = g * (v - b + scale * d) + b
    else:
        v = g * (v + scale * d)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=live)
