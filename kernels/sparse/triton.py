"""Sparse deltas on a GPU: exchange entries of a weight in place, or multiply by the entries beside the base."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exchange_kernel(
    w,       # (m n,) weight, changed in place
    index,   # (P,) int32 or int64 flat positions, unique
    values,  # (P,) new entries, of w's dtype; or entries of the delta, any float dtype, if ADD
    saved,   # (P,) what stood there, of w's dtype; unwritten unless SAVE
    scale,   # multiplier of the delta; unread unless ADD
    P, ADD: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """saved = w[index]; w[index] = values, or saved + scale * values rounded once. No entry is touched twice."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < P
    where = tl.load(index + at, mask=live, other=0).to(tl.int64)
    new = tl.load(values + at, mask=live, other=0.0)
    if ADD or SAVE:
        old = tl.load(w + where, mask=live, other=0.0)
        if SAVE:
            tl.store(saved + at, old, mask=live)
        if ADD:
            new = old.to(tl.float32) + scale * new.to(tl.float32)
    tl.store(w + where, new.to(w.dtype.element_ty), mask=live)


@triton.jit
def gathered_rows(
    z, z_row, starts, columns, values, rows, outs, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """(BM, BN) float32: sum over the entries of each of BN sparse rows of value * z[row, column]."""
    safe = tl.where(outs < N, outs, 0)
    begin = tl.load(starts + safe)
    end = tl.where(outs < N, tl.load(starts + safe + 1), begin)
    longest = tl.max(end - begin, axis=0)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    e = 0
    while e < longest:
        at = begin[:, None] + e + tl.arange(0, BE)[None, :]
        live = at < end[:, None]
        column = tl.load(columns + at, mask=live, other=0).to(tl.int32)
        value = tl.load(values + at, mask=live, other=0.0).to(tl.float32)
        from_z = z + rows.to(tl.int64)[:, None, None] * z_row + column[None, :, :]
        got = tl.load(from_z, mask=(rows < M)[:, None, None] & live[None, :, :], other=0.0).to(tl.float32)
        acc += tl.sum(got * value[None, :, :], axis=2)
        e += BE
    return acc


@triton.jit
def side_kernel(
    x,        # (M, K) rows x_row apart, any float dtype
    starts,   # (N + 1,) int32: where each row's entries begin
    columns,  # (P,) int16 or int32
    values,   # (P,) any float dtype
    y,        # (M, N) contiguous, added to
    scale,    # multiplier of the delta
    M, x_row, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """y += scale * x S^T for S sparse by rows; one program BM rows of x by BN rows of S."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = gathered_rows(x, x_row, starts, columns, values, rows, outs, M, N, BM, BN, BE)
    to = y + rows.to(tl.int64)[:, None] * N + outs[None, :]
    live = (rows < M)[:, None] & (outs < N)[None, :]
    tl.store(to, (tl.load(to, mask=live, other=0.0).to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=live)
