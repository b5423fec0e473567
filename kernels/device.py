"""Which implementation runs, and the scratch memory that one-launch kernels meet in."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.errors import NeedsError, UnsupportedError, UsageError

Backend = Literal["naive", "triton", "native"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def has(module: str) -> bool:
    """Return whether an optional module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def interpreting() -> bool:
    """Return whether Triton kernels run in its interpreter; it must be set before a kernel module is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend(x: Tensor) -> Backend:
    """Return the implementation for activations x: Triton on a GPU, native code on a CPU, unless ADAPTC_KERNELS says.

    Raises UnsupportedError for a dtype no kernel takes, NeedsError where the forced or only choice is not installed.
    """
    if x.dtype not in FLOATS:
        raise UnsupportedError(f"activations have dtype {x.dtype}, the kernels take float32, bfloat16 and float16")
    wish = os.environ.get("ADAPTC_KERNELS", "auto")
    if wish not in ("auto", "naive", "triton", "native"):
        raise UsageError(f"ADAPTC_KERNELS is {wish}, not one of auto, naive, triton, native")
    if wish == "naive":
        return "naive"
    if wish == "triton" or (wish == "auto" and x.is_cuda):
        if not has("triton"):
            raise NeedsError("triton is not installed", hint="pip install triton, or set ADAPTC_KERNELS=naive")
        if not x.is_cuda and not interpreting():
            raise NeedsError(f"activations are on {x.device}, Triton needs a GPU or TRITON_INTERPRET=1")
        return "triton"
    if wish == "native" or (wish == "auto" and x.device.type == "cpu"):
        if has("llvmlite") and x.device.type == "cpu":
            return "native"
        if wish == "native":
            raise NeedsError(f"native code needs llvmlite and a CPU, activations are on {x.device}")
    return "naive"


def compute_type(x: Tensor) -> Any:
    """Return the Triton type that products are taken in: x's own on a GPU, float32 in the interpreter.

    The interpreter multiplies bfloat16 bit patterns as integers (triton issue 11584) and returns about 1e10, silently.
    """
    import triton.language as tl

    if interpreting():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def permutes(x: Tensor) -> bool:
    """Return whether the PTX table lookup applies: NVIDIA, not interpreted, half precision."""
    return not interpreting() and torch.version.hip is None and x.dtype != torch.float32


@dataclass
class Scratch:
    """Flags that every kernel leaves at zero, and floats that it writes before it reads."""

    flags: Tensor  # (f,) int32
    floats: Tensor  # (n,) float32


_SCRATCH: dict[tuple[torch.device, int], Scratch] = {}
_CAPTURED = -1


def scratch(device: torch.device, flags: int, floats: int) -> Scratch:
    """Return scratch memory of at least these sizes for the current stream.

    Kernels on one stream run in order and may share it. A CUDA graph takes a set of its own, allocated here by the
    eager call that warms it up; graphs that replay at the same time on several streams need one process each.
    """
    stream, capturing = 0, False
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        stream = _CAPTURED if capturing else torch.cuda.current_stream(device).cuda_stream
    found = _SCRATCH.get((device, stream))
    if found is not None and found.flags.numel() >= flags and found.floats.numel() >= floats:
        return found
    old = found or Scratch(torch.empty(0), torch.empty(0))
    count, size = max(flags, 4096, old.flags.numel()), max(floats, 1 << 20, old.floats.numel())
    if capturing:  # memory of the graph's own pool: not ours to keep, zeroed anew by every replay
        return _allocate(device, count, size)
    made = _SCRATCH[device, stream] = _allocate(device, count, size)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
        _RETIRED.append(old)  # a graph may still replay into it
        if (kept := _SCRATCH.get((device, _CAPTURED))) is not None:
            _RETIRED.append(kept)
        _SCRATCH[device, _CAPTURED] = _allocate(device, count, size)
    return made


_RETIRED: list[Scratch] = []


def _allocate(device: torch.device, flags: int, floats: int) -> Scratch:
    return Scratch(
        torch.zeros(flags, dtype=torch.int32, device=device), torch.empty(floats, dtype=torch.float32, device=device)
    )
