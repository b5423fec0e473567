"""One launch of every kernel and variant, on meta tensors: what the ahead-of-time table compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from adaptc.kernels.resident import Resident
from adaptc.kernels.weight import Weight

Launch = tuple[str, Callable[[], Any], tuple[Any, ...]]
M, N = 4096, 4096


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(code: str, dtype: torch.dtype) -> Weight:
    """Return a base weight without memory."""
    if code == "plain":
        return Weight("plain", empty(M, N, dtype=dtype), None, (M, N))
    scales = empty(N // 64, M).t()
    return Weight(code, empty(M, N // 2, dtype=torch.uint8), scales, (M, N))  # type: ignore[arg-type]


def adapter(planes: int, dtype: torch.dtype) -> Resident:
    """Return an adapter without memory: sign planes for int16, else plain factors."""
    rows = planes // 16 if dtype == torch.int16 else planes
    return Resident(empty(rows, N, dtype=dtype), empty(rows, M, dtype=dtype), empty(planes, planes), planes)


def launches() -> Iterator[Launch]:
    """Yield (name, launcher, modules whose kernels it launches)."""
    from adaptc.kernels import decode
    from adaptc.kernels.decode import triton as decode_triton

    half, brain = torch.float16, torch.bfloat16
    for code, dtype, planes, kind, rows in (
        ("nf4", brain, 16, torch.int16, 1),
        ("nf4", half, 64, torch.int16, 16),
        ("int4", half, 16, half, 16),
        ("plain", brain, 16, torch.int16, 16),
        ("plain", brain, 64, brain, 64),
        ("nf4", torch.float32, 16, torch.int16, 4),
    ):
        name = f"decode/{code}-{str(dtype)[6:]}-{'planes' if kind == torch.int16 else 'plain'}{planes}-m{rows}"
        x, w, a = empty(rows, N, dtype=dtype), weight(code, dtype), adapter(planes, kind)
        yield name, lambda x=x, w=w, a=a: decode.launch(x, w, a, 1.0, None), (decode_triton,)
