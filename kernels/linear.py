"""The linear layer with its adapter as one torch op: any number of rows, torch.compile, autograd with respect to x."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels.decode import MAX_ROWS, decode
from adaptc.kernels.device import FLOATS
from adaptc.kernels.prefill import prefill
from adaptc.kernels.resident import Resident, unpack
from adaptc.kernels.weight import Weight, unpack_weight


def linear(
    x: Tensor,
    weight: Weight,
    adapter: Resident | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain * (x w0^T + scale * dW x) + bias for x (..., n) of any float dtype; differentiable in x alone.

    Up to 64 rows run the decode kernel, more the prefill kernels. Raises UnsupportedError for shapes that do not fit,
    dtypes no kernel takes, or operands on several devices.
    """
    m, n = weight.shape
    if x.shape[-1] != n:
        raise UnsupportedError(f"activations have width {x.shape[-1]}, the weight takes {n}")
    if adapter is not None and adapter.shape != (m, n):
        raise UnsupportedError(f"adapter is for {adapter.shape[0]} x {adapter.shape[1]}, the weight is {m} x {n}")
    if x.dtype not in FLOATS:
        raise UnsupportedError(f"activations have dtype {x.dtype}, the kernels take float32, bfloat16 and float16")
    for name, other in (("weight", weight.data), ("adapter", None if adapter is None else adapter.q)):
        if other is not None and other.device != x.device:
            raise UnsupportedError(f"{name} is on {other.device}, activations are on {x.device}")
    rows = x.reshape(-1, n)
    parts = (None, None, None) if adapter is None else (adapter.q, adapter.p, adapter.core)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = torch.ops.adaptc.linear(
            rows,
            weight.data,
            weight.scales,
            weight.code,
            m,
            n,
            *parts,
            0 if adapter is None else adapter.rank,
            scale,
            bias,
            gain,
        )
    else:  # the dispatcher costs ten times what a native call does
        y = run(rows, weight, adapter, scale, bias, gain)
    return y.view(*x.shape[:-1], m)


def run(
    x: Tensor, weight: Weight, adapter: Resident | None, scale: float, bias: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Choose by the number of rows of x (M, n)."""
    op = decode if x.shape[0] <= MAX_ROWS else prefill
    return op(x, weight, adapter, scale, bias, gain)


@torch.library.custom_op("adaptc::linear", mutates_args=())
def _linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    code: str,
    m: int,
    n: int,
    q: Tensor | None,
    p: Tensor | None,
    core: Tensor | None,
    rank: int,
    scale: float,
    bias: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    weight, adapter = _values(data, scales, code, m, n, q, p, core, rank)
    y = run(x, weight, adapter, scale, bias, gain)
    return y if y.is_contiguous() else y.contiguous()


@_linear.register_fake
def _(x: Tensor, data: Tensor, scales: Tensor | None, code: str, m: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], m)


def _values(
    data: Tensor,
    scales: Tensor | None,
    code: str,
    m: int,
    n: int,
    q: Tensor | None,
    p: Tensor | None,
    core: Tensor | None,
    rank: int,
) -> tuple[Weight, Resident | None]:
    """Rebuild the values that an op's flat arguments stand for."""
    adapter = None if q is None or p is None or core is None else Resident(q, p, core, rank)
    return Weight(code, data, scales, (m, n)), adapter  # type: ignore[arg-type]


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    """Keep what the gradient needs: everything but x and the bias, for the layer is linear in x."""
    _x, data, scales, code, m, n, q, p, core, rank, scale, _bias, gain = inputs
    ctx.save_for_backward(data, scales, q, p, core, gain)  # type: ignore[arg-type]
    ctx.settings = (code, m, n, rank, scale)  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = (gain * dy) w0 + scale * (((gain * dy) Sp) C^T) Sq, in float32, dW never formed."""
    data, scales, q, p, core, gain = ctx.saved_tensors  # type: ignore[attr-defined]
    code, m, n, rank, scale = ctx.settings  # type: ignore[attr-defined]
    weight, adapter = _values(data, scales, code, m, n, q, p, core, rank)
    wide = grad.float() if gain is None else grad.float() * gain.float()
    dx = wide @ unpack_weight(weight)
    if adapter is not None:
        p_side, inner, q_side = unpack(adapter)
        dx = dx + scale * (((wide @ p_side) @ inner) @ q_side)
    return dx.to(grad.dtype), *(None,) * 12


_linear.register_autograd(_gradient, setup_context=_remember)
