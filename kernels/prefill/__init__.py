"""Many rows: shrink once, expand as the base product's epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.kernels.decode import CODES, codes, lookup_table
from adaptc.kernels.device import backend, compute_type, permutes
from adaptc.kernels.prefill import naive
from adaptc.kernels.resident import Resident
from adaptc.kernels.weight import BLOCK, Weight


@dataclass(frozen=True, slots=True)
class Tiles:
    """BM rows by BN columns a program, BK of the contraction an iteration; KQ columns a shrink program."""

    bm: int
    bn: int
    bk: int
    kq: int
    warps: int
    stages: int


def tiles(rows: int, n: int, k: int, code: str, wide: bool) -> Tiles:
    """Choose tiles; float32 products take no tensor core and hold half as much in registers."""
    if wide:
        return Tiles(32, 64, 64, 512, 4, 2)
    return Tiles(128 if rows > 64 else 64, 128, 64, 512, 8, 3 if code == "plain" else 4)


def prefill(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None,
    scale: float,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain * (x w0^T + scale * dW x) + bias for x (M, n), any M, by the fastest implementation for x's device."""
    choice = backend(x)
    if choice == "triton":
        return launch(x, weight, adapter, scale, bias, gain)
    if choice == "native":
        from adaptc.kernels.native import linear as native

        return native.linear(x, weight, adapter, scale, bias, gain)
    return naive.linear(x, weight, adapter, scale, bias, gain)


def launch(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None,
    scale: float,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    shape: Tiles | None = None,
) -> Tensor:
    """Run the two Triton kernels (the second alone for the plain base); `shape` overrides the tiles."""
    from adaptc.kernels.prefill.triton import prefill_kernel, shrink_kernel

    (rows, k), n = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    t = shape or tiles(rows, n, k, weight.code, x.dtype == torch.float32)
    sort = weight.scales is not None
    padded = weight.data.shape[1] * 2 if sort else k
    slices, asm = -(-padded // t.kq), permutes(x) and sort
    tp, packed = (0, False) if adapter is None else (adapter.core.shape[1], adapter.packed)
    shrunk = torch.empty(slices, rows, max(tp, 1), dtype=torch.float32, device=x.device)
    sorted_x = torch.empty(rows, padded, dtype=x.dtype, device=x.device) if sort else x
    if sort or adapter is not None:
        factors = (x, x) if adapter is None else (adapter.q, adapter.core)
        shrink_kernel[(-(-rows // (64 if tp <= 64 else 16)), slices)](
            x, *factors, scale, shrunk, sorted_x, rows, x.stride(0),
            K=k, KP=padded, TQ=16 if adapter is None else adapter.core.shape[0], TP=tp, PACKED=packed, SLICES=slices,
            KQ=t.kq, SORT=sort, BM=64 if tp <= 64 else 16, BQ=64 if tp <= 64 else 32,
            DT=compute_type(x), ASM=asm, num_warps=4, num_stages=3,
        )  # fmt: skip
    scales = x if weight.scales is None else weight.scales
    prefill_kernel[(-(-rows // t.bm) * -(-n // t.bn),)](
        sorted_x, codes(weight), scales, lookup_table(weight, x.device), x if bias is None else bias,
        x if gain is None else gain,
        x if adapter is None else adapter.p, shrunk, y, rows, sorted_x.stride(0),
        N=n, K=k, KP=padded, S_ROW=scales.stride(0), S_COL=scales.stride(1), CODE=CODES[weight.code],
        BIAS=bias is not None, GAIN=gain is not None, TP=tp, PACKED=packed, SLICES=slices, BM=t.bm, BN=t.bn, BK=t.bk,
        DT=compute_type(x), ASM=asm, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return y


__all__ = ["BLOCK", "Tiles", "launch", "prefill", "tiles"]
