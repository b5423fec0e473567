"""One launch of every kernel and variant, on meta tensors: what the ahead-of-time table compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
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


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's short name."""
    return str(dtype).removeprefix("torch.")


def launches() -> Iterator[Launch]:
    """Yield (name, launcher, modules whose kernels it launches)."""
    yield from _linear()
    yield from _many()
    yield from _others()


def _linear() -> Iterator[Launch]:
    from adaptc.kernels import decode, prefill
    from adaptc.kernels.decode import triton as decode_triton
    from adaptc.kernels.prefill import triton as prefill_triton

    half, brain, bits = torch.float16, torch.bfloat16, torch.int16
    for code, dtype, planes, kind, rows in (
        ("nf4", brain, 16, bits, 1),
        ("nf4", half, 64, bits, 16),
        ("int4", half, 16, half, 16),
        ("plain", brain, 16, bits, 16),
        ("plain", brain, 64, brain, 64),
        ("nf4", torch.float32, 16, bits, 4),
        ("nf4", brain, 256, bits, 16),
        ("nf4", brain, 16, bits, 512),
        ("plain", half, 64, half, 512),
        ("plain", torch.float32, 16, bits, 512),
    ):
        few = rows <= decode.MAX_ROWS
        factors = "planes" if kind == bits else "plain"
        name = f"{'decode' if few else 'prefill'}/{code}-{name_of(dtype)}-{factors}{planes}-m{rows}"
        x, w, a, bias = empty(rows, N, dtype=dtype), weight(code, dtype), adapter(planes, kind), empty(M, dtype=dtype)
        launch, module = (decode.launch, decode_triton) if few else (prefill.launch, prefill_triton)
        yield name, partial(launch, x, w, a, 1.0, bias, empty(M)), (module,)
    yield (
        "decode/nf4-bfloat16-none-m1",
        partial(decode.launch, empty(1, N, dtype=brain), weight("nf4", brain), None, 1.0),
        (decode_triton,),
    )


def _many() -> Iterator[Launch]:
    from adaptc.kernels import batch
    from adaptc.kernels.batch import triton as batch_triton
    from adaptc.kernels.pool import PLAIN, PLANES, Pool

    for code, dtype, rows, kinds in (
        ("nf4", torch.bfloat16, 32, {PLANES: 1, PLAIN: 0}),
        ("nf4", torch.float16, 16, {PLANES: 1, PLAIN: 1}),
        ("plain", torch.bfloat16, 512, {PLANES: 1, PLAIN: 1}),
        ("nf4", torch.bfloat16, 512, {PLANES: 1, PLAIN: 0}),
    ):
        pool = Pool(64, 4, device="meta")
        pool.kinds, pool.widest = kinds, 4
        runs = batch.Batch(
            empty(32, 3, dtype=torch.int32), empty(9, dtype=torch.int32), empty(rows, dtype=torch.int32), rows, ()
        )
        mixture = "mixed" if kinds[PLAIN] else "planes"
        x, w = empty(rows, N, dtype=dtype), weight(code, dtype)
        name = f"batch/{code}-{name_of(dtype)}-{mixture}-m{rows}"
        yield name, partial(batch.launch, x, w, pool, runs, None), (batch_triton,)


def _others() -> Iterator[Launch]:
    from adaptc.kernels import dora, sparse, walsh
    from adaptc.kernels.dora import triton as dora_triton
    from adaptc.kernels.sparse import Rows
    from adaptc.kernels.sparse import triton as sparse_triton
    from adaptc.kernels.walsh import triton as walsh_triton

    brain, index = torch.bfloat16, torch.int32
    for order, length in ((1, 4096), (28, 1024), (1, 16384)):
        n = order * length
        rows = Rows(empty(M + 1, dtype=index), empty(1 << 19, dtype=torch.int16), empty(1 << 19, dtype=brain), (M, n))
        x, had, y = empty(4, n, dtype=brain), empty(order, order), empty(4, M, dtype=brain)
        yield f"walsh/{order}x{length}-m4", partial(walsh.launch, x, had, length, rows, y, 1.0), (walsh_triton,)
    rows = Rows(empty(M + 1, dtype=index), empty(1 << 18, dtype=torch.int16), empty(1 << 18, dtype=brain), (M, N))
    x, y = empty(16, N, dtype=brain), empty(16, M, dtype=brain)
    yield "sparse/side-m16", partial(sparse.launch, x, rows, y, 1.0), (sparse_triton,)
    w, where, delta = empty(M, N, dtype=brain), empty(1 << 18, dtype=index), empty(1 << 18)
    yield "sparse/shift", partial(sparse.exchange, w, where, delta, 1.0, add=True), (sparse_triton,)
    yield "sparse/overwrite", partial(sparse.exchange, w, where, delta.to(brain), 1.0, add=False), (sparse_triton,)
    for code in ("nf4", "plain"):
        base = weight(code, brain)
        yield f"dora/norms-{code}", partial(dora.launch, base, adapter(16, torch.int16), 1.0, empty(M)), (dora_triton,)
    yield (
        "dora/compose",
        partial(dora.launch_compose, empty(512, M, dtype=brain), empty(512, M, dtype=brain), empty(M), None, 1.0),
        (dora_triton,),
    )
