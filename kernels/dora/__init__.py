"""DoRA: factored row norms, and the fused compose step.

Inside a linear layer neither is needed per call: pass gain = magnitude / norm to `linear`, whose epilogue applies it.
`compose` is for a base product that was made elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels.decode import CODES, codes, lookup_table
from adaptc.kernels.device import backend, compute_type, interpreting, permutes
from adaptc.kernels.dora import naive
from adaptc.kernels.resident import Resident, unpack, unpack_words
from adaptc.kernels.weight import Weight, unpack_weight

MAX_PLANES = 128


def row_norms(weight: Weight, adapter: Resident, scale: float, squares: Tensor | None = None) -> Tensor:
    """||w0 + scale * dW|| by rows (m,), float32, without forming dW.

    squares (m,) are the squared row norms of w0 alone, a constant of the base worth keeping (`naive.row_squares`).
    """
    squares = naive.row_squares(weight) if squares is None else squares
    if adapter.shape != weight.shape:
        raise UnsupportedError(f"adapter is for {adapter.shape}, the weight is {weight.shape}")
    wide = max(adapter.core.shape) > MAX_PLANES  # more rows than a program's registers hold
    if backend(squares) == "triton" and not wide:
        return launch(weight, adapter, scale, squares)
    p, core, q = unpack(adapter)
    m, n = weight.shape
    cross = torch.empty(m, core.shape[1], dtype=torch.float32, device=q.device)
    for start in range(0, m, naive.ROWS):
        scales = None if weight.scales is None else weight.scales[start : start + naive.ROWS]
        data = weight.data[start : start + naive.ROWS]
        block = unpack_weight(Weight(weight.code, data, scales, (data.shape[0], n)))
        cross[start : start + naive.ROWS] = block @ q.t()
    inner = p @ core
    # the r x r Gram carries the cancellation between the terms: float64 costs nothing there
    gram = (q.double() @ q.double().t()).float()
    total = squares + 2 * scale * (inner * cross).sum(1) + scale**2 * (inner @ gram * inner).sum(1)
    return total.clamp_min(0).sqrt()


def launch(weight: Weight, adapter: Resident, scale: float, squares: Tensor) -> Tensor:
    """Run the norms kernel; products in bfloat16 on a GPU for half-precision and 4-bit bases, else float32."""
    from adaptc.kernels.dora.triton import norms_kernel

    m, n = weight.shape
    half = torch.float32 if weight.data.dtype == torch.float32 or interpreting() else torch.bfloat16
    q = (unpack_words(adapter.q) if adapter.packed else adapter.q).to(half).contiguous()
    core = adapter.core
    gram = core.t().double() @ (q.double() @ q.double().t()) @ core.double()
    scales = q if weight.scales is None else weight.scales
    out = torch.empty(m, dtype=torch.float32, device=squares.device)
    norms_kernel[(-(-m // 64),)](
        q, codes(weight), scales, lookup_table(weight, squares.device), adapter.p, core, gram.float().contiguous(),
        squares, out, scale, N=m, K=n, KP=n if weight.scales is None else weight.data.shape[1] * 2,
        S_ROW=scales.stride(0), S_COL=scales.stride(1), CODE=CODES[weight.code], TQ=core.shape[0], TP=core.shape[1],
        PACKED=adapter.packed, BN=64, BK=64, DT=compute_type(q), ASM=permutes(q) and weight.code != "plain",
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def compose(base: Tensor, delta: Tensor, gain: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """gain * (base - bias + scale * delta) + bias for base (M, m), which already holds the bias."""
    if backend(base) == "triton":
        return launch_compose(base.contiguous(), delta.contiguous(), gain, bias, scale)
    return naive.compose(base, delta, gain, bias, scale)


def launch_compose(base: Tensor, delta: Tensor, gain: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Run the compose kernel."""
    from adaptc.kernels.dora.triton import compose_kernel

    out, (m, n) = torch.empty_like(base), base.shape
    if m:
        bm = 1 if m < 8 else 4
        compose_kernel[(-(-n // 512), -(-m // bm))](
            base, delta, gain, base if bias is None else bias, out, scale, m, N=n, BIAS=bias is not None, BM=bm, BN=512
        )
    return out


__all__ = ["compose", "launch", "launch_compose", "row_norms"]
