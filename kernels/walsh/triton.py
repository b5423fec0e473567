"""Walsh-Hadamard transform and sparse spectral product in one launch, for every supported width."""

# mypy: ignore-errors
# (device code: Triton's values have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels.sparse.triton import gathered_rows
from adaptc.kernels.tiles import arrive, wait


@triton.jit
def butterflies(v, LENGTH: tl.constexpr, LOG: tl.constexpr):
    """Sylvester-Hadamard transform of a (LENGTH,) tile, unnormalised.

    Each step adds and subtracts the halves and interleaves them: the top bit of the index becomes the lowest, so after
    LOG steps every bit has had its butterfly and the order is natural again.
    """
    for _ in tl.static_range(LOG):
        u, d = tl.split(tl.trans(tl.reshape(v, (2, LENGTH // 2))))
        v = tl.reshape(tl.join(u + d, u - d), (LENGTH,))
    return v


@triton.jit
def walsh_kernel(
    x,         # (M, K) rows x_row apart, K = GROUPS * ORDER * LENGTH
    had,       # (ORDER, ORDER) float32 Hadamard matrix of +-1; unread if ORDER is 1
    starts,    # (N + 1,) int32 rows of the sparse coefficients; unread if N is 0
    columns,   # (P,) int16 or int32 spectral positions
    values,    # (P,) coefficients, any float dtype
    y,         # (M, N) contiguous, added to; unused if N is 0
    half,      # (M, K) float32 scratch: after the power-of-two part
    spectrum,  # (M, K) float32: U x; scratch, or the result if N is 0
    flags,     # (3,) int32, zero before and after
    scale,     # multiplier of the delta
    M, x_row, norm,
    K: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, ORDER: tl.constexpr, PADDED: tl.constexpr,
    LENGTH: tl.constexpr, LOG: tl.constexpr, SLAB: tl.constexpr, SLABS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """y += scale * F (U x), U = I_GROUPS (x) (had (x) Sylvester(LENGTH)) * norm on the input side.

    Three stages of programs in order of id, each waiting for the one before: M * GROUPS * ORDER chunks of LENGTH, then
    (ORDER > 1) M * GROUPS * SLABS slabs across the ORDER chunks, then tiles of BM x BN outputs.
    """
    pid = tl.program_id(0)
    chunks = M * (GROUPS * ORDER)
    slabs = M * (GROUPS * SLABS) if ORDER > 1 else 0
    i = tl.arange(0, LENGTH)
    if pid < chunks:
        row = (pid // (GROUPS * ORDER)).to(tl.int64)
        at = (pid % (GROUPS * ORDER)) * LENGTH
        v = butterflies(tl.load(x + row * x_row + at + i).to(tl.float32), LENGTH, LOG)
        if ORDER > 1:
            tl.store(half + row * K + at + i, v)
        else:
            tl.store(spectrum + row * K + at + i, v * norm)
        arrive(flags)
    elif pid < chunks + slabs:
        slab = pid - chunks
        start = (slab // SLABS).to(tl.int64) * (ORDER * LENGTH) + (slab % SLABS) * SLAB
        j = start + tl.arange(0, SLAB)
        out = tl.arange(0, PADDED)
        wait(flags, chunks)
        across = tl.zeros((PADDED, SLAB), dtype=tl.float32)  # no name of the next branch: Triton merges their types
        for k in range(ORDER):
            sign = tl.load(had + out * ORDER + k, mask=out < ORDER, other=0.0)
            across += sign[:, None] * tl.load(half + j + k * LENGTH, cache_modifier=".cg")[None, :]
        tl.store(spectrum + out[:, None] * LENGTH + j[None, :], across * norm, mask=(out < ORDER)[:, None])
        arrive(flags + 1)
    elif N > 0:
        task = pid - chunks - slabs
        tiles_n: tl.constexpr = (N + BN - 1) // BN
        rows = (task // tiles_n) * BM + tl.arange(0, BM)
        outs = (task % tiles_n) * BN + tl.arange(0, BN)
        if ORDER > 1:
            wait(flags + 1, slabs)
        else:
            wait(flags, chunks)
        acc = gathered_rows(spectrum, K, starts, columns, values, rows, outs, M, N, BM, BN, BE)
        to = y + rows.to(tl.int64)[:, None] * N + outs[None, :]
        live = (rows < M)[:, None] & (outs < N)[None, :]
        tl.store(to, (tl.load(to, mask=live, other=0.0).to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=live)
    # the last program of the last stage leaves the flags as it found them
    if arrive(flags + 2) == tl.num_programs(0) - 1:
        tl.store(flags, 0)
        tl.store(flags + 1, 0)
        tl.store(flags + 2, 0)
