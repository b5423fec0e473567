"""Few rows (M <= 64): the fused decode linear, one launch on a GPU, one native call on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.kernels.decode import naive
from adaptc.kernels.device import backend, compute_type, interpreting, permutes, scratch
from adaptc.kernels.resident import Resident
from adaptc.kernels.weight import BLOCK, Weight

MAX_ROWS = 64
CODES = {"plain": 0, "nf4": 1, "int4": 2}


@dataclass(frozen=True, slots=True)
class Plan:
    """Tile sizes of one launch: BN rows of w, KS = columns a split, KQ = columns a shrink program."""

    bm: int
    bn: int
    bk: int
    split: int
    ks: int
    slices: int
    kq: int
    bq: int
    warps: int
    stages: int


def plan(m_rows: int, n: int, k: int, code: str) -> Plan:
    """Choose tiles, by a sweep on an H100: 4 to 16 warps on each of its 132 multiprocessors, splits of 1024 or more."""
    padded = -(-k // BLOCK) * BLOCK
    bm = 16 if m_rows <= 16 else 32 if m_rows <= 32 else 64
    kq = max(512, -(-k // (8 * 128)) * 128)
    if code == "plain" and bm == 16:  # narrow tiles need no split to fill the machine
        bn, bk, split, warps, stages = 16, 256, 1, 2, 4
    else:
        bn, bk, split, warps, stages = 64, 128, min(4, padded // 2048), 4, 4 if code == "plain" else 3
    tiles = -(-n // bn)
    split = max(1, split, min(264 // tiles, padded // 512, 8))
    ks = -(-padded // (split * bk)) * bk
    return Plan(bm, bn, bk, -(-padded // ks), ks, -(-k // kq), kq, 128, warps, stages)


def decode(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None,
    scale: float,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain * (x w0^T + scale * dW x) + bias for x (M, n), M <= 64, by the fastest implementation for x's device."""
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
    tiles: Plan | None = None,
) -> Tensor:
    """Run the Triton kernel; `tiles` overrides the plan."""
    from adaptc.kernels.decode.triton import decode_kernel

    (rows, k), n = x.shape, weight.shape[0]
    t = tiles or plan(rows, n, k, weight.code)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    tp = 0 if adapter is None else adapter.core.shape[1]
    blocks, slices = -(-n // t.bn), 0 if adapter is None else t.slices
    shrunk = slices * t.bm * tp
    room = scratch(x.device, 1 + blocks, shrunk + blocks * t.split * t.bn * t.bm)
    scales = x if weight.scales is None else weight.scales
    decode_kernel[(slices + blocks * t.split,)](
        x, codes(weight), scales, lookup_table(weight, x.device), x if bias is None else bias,
        x if gain is None else gain,
        *((x, x, x) if adapter is None else (adapter.q, adapter.p, adapter.core)), scale,
        y, room.floats, room.floats[shrunk:], room.flags, rows, x.stride(0),
        N=n, K=k, KP=k if weight.scales is None else weight.data.shape[1] * 2,
        S_ROW=scales.stride(0), S_COL=scales.stride(1), CODE=CODES[weight.code], BIAS=bias is not None,
        GAIN=gain is not None,
        TQ=16 if adapter is None else adapter.core.shape[0], TP=tp, PACKED=adapter is not None and adapter.packed,
        SLICES=slices, KQ=t.kq, SPLIT=t.split, KS=t.ks, BM=t.bm, BN=t.bn, BK=t.bk, BQ=t.bq if tp <= 64 else 32,
        DT=compute_type(x), ASM=permutes(x) and weight.code != "plain", num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return y


_TABLES: dict[tuple[str, torch.device], Tensor] = {}


def lookup_table(weight: Weight, device: torch.device) -> Tensor:
    """Return the 16 values of a code on a device; kept, so that a CUDA graph never captures the copy."""
    key = (weight.code, device)
    if key not in _TABLES:
        _TABLES[key] = torch.tensor(weight.table, dtype=torch.float32, device=device)
    return _TABLES[key]


def codes(weight: Weight) -> Tensor:
    """Return the data of a weight as a kernel reads it: 4-bit codes four to an int16."""
    return weight.data if weight.scales is None else weight.data.view(torch.int16)


__all__ = ["MAX_ROWS", "Plan", "decode", "interpreting", "launch", "plan"]
