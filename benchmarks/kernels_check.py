"""Check every kernel on the device at hand against float64: random inputs, odd sizes, poisoned outputs, repeated runs.

`python kernels_check.py DEVICE [SHARD SHARDS]` prints one JSON line: cases run, failures, worst error of each dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import kernels_path  # noqa: F401  (finds adaptc in the checkout where it is not installed)
import torch
from torch import Tensor

from adaptc.kernels import batch, decode, dora, prefill, sparse, walsh
from adaptc.kernels.resident import Resident, pack_plain, pack_planes, unpack
from adaptc.kernels.weight import Weight, pack_weight, plain_weight, unpack_weight

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
Result = tuple[str, torch.dtype, float]
Case = Callable[[], Result]


def planes(m: int, n: int, bits: list[int], device: str) -> Resident:
    """Return a random adapter of sign planes with directions of the given widths."""
    p = torch.stack([2 * torch.randint(0, 1 << b, (m,)) - (1 << b) + 1 for b in bits], 1)
    q = torch.stack([2 * torch.randint(0, 1 << b, (n,)) - (1 << b) + 1 for b in bits], 0)
    core = torch.randn(len(bits), len(bits)) / n**0.5
    return pack_planes(p, q, core, bits, bits, torch.rand(len(bits)), torch.rand(len(bits))).to(device)


def plain(m: int, n: int, rank: int, dtype: torch.dtype, device: str) -> Resident:
    """Return a random adapter of plain factors."""
    return pack_plain(torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5, None, dtype).to(device)


def base(m: int, n: int, code: str, dtype: torch.dtype, device: str) -> Weight:
    """Return a random base weight."""
    dense = torch.randn(m, n, device=device) / n**0.5
    return plain_weight(dense.to(dtype)) if code == "plain" else pack_weight(dense, code)  # type: ignore[arg-type]


def exact(
    x: Tensor, w: Weight, a: Resident | None, scale: float, bias: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """Return the linear layer in float64."""
    wide = x.double()
    y = wide @ unpack_weight(w).double().t()
    if a is not None:
        p, core, q = (t.double() for t in unpack(a))
        y = y + scale * (wide @ q.t() @ core.t() @ p.t())
    y = y if gain is None else y * gain.double()
    return y if bias is None else y + bias.double()


def error(runs: list[Tensor], ref: Tensor) -> float:
    """Relative Frobenius error of the first run; nan where it is not finite or another run differs from it."""
    if not all(torch.equal(runs[0], other) for other in runs[1:]):
        return float("nan")
    return float((runs[0].double() - ref).norm() / ref.norm())


def linear_cases(device: str) -> Iterator[Case]:
    """Decode and prefill: every base, every width of adapter, odd sizes, biases and gains."""
    shapes = [
        (1, 4096, 4096),
        (5, 130, 1000),
        (16, 1024, 11008),
        (33, 777, 640),
        (64, 512, 96),
        (70, 300, 264),
        (200, 640, 1088),
    ]
    kinds: list[list[int] | int | None] = [None, [1] * 16, [3, 2, 2, 1], [1] * 64, [4] * 64, 1, 16, 64]
    for i, (rows, m, n) in enumerate(shapes):
        for j, kind in enumerate(kinds):
            for code in ("plain", "nf4", "int4") if j == 1 else (("nf4", "plain", "nf4", "int4")[(i + j) % 4],):
                dtype = (torch.bfloat16, torch.float16, torch.float32)[(i + j) % 3]
                if dtype == torch.float32 and m * n > 1 << 20:
                    dtype = torch.bfloat16
                yield partial(linear_case, device, rows, m, n, kind, code, dtype, j % 2 == 1, j % 3 == 0)


def linear_case(
    device: str,
    rows: int,
    m: int,
    n: int,
    kind: list[int] | int | None,
    code: str,
    dtype: torch.dtype,
    bias: bool,
    gain: bool,
) -> Result:
    """Run one linear layer four times."""
    x, w = torch.randn(rows, n, device=device).to(dtype), base(m, n, code, dtype, device)
    a = (
        None
        if kind is None
        else planes(m, n, kind, device)
        if isinstance(kind, list)
        else plain(m, n, kind, dtype, device)
    )
    b = torch.randn(m, device=device).to(dtype) if bias else None
    g = torch.rand(m, device=device) if gain else None
    op = decode.decode if rows <= decode.MAX_ROWS else prefill.prefill
    name = f"{op.__name__} {code} {rows}x{m}x{n} {len(kind) if isinstance(kind, list) else kind}"
    return name, dtype, error([op(x, w, a, 0.7, b, g) for _ in range(4)], exact(x, w, a, 0.7, b, g))


def many_cases(device: str) -> Iterator[Case]:
    """Batches of adapters of several ranks and kinds, with pages reused after an eviction."""
    long = [0] * 100 + [1] * 33 + [-1] * 9 + [2, 3] * 10 + [1] * 70
    for code, m, n in (("nf4", 1024, 4096), ("plain", 130, 600), ("nf4", 777, 1088)):
        for dtype in (torch.bfloat16, torch.float16):
            for ids in ([0], [0, 1, 1, -1, 2, 3, 0], [i % 4 for i in range(48)], long):
                yield partial(many_case, device, code, m, n, dtype, ids)


def many_case(device: str, code: str, m: int, n: int, dtype: torch.dtype, ids: list[int]) -> Result:
    """Run one batch four times."""
    w, pool = base(m, n, code, dtype, device), batch.Pool(2048, 16, device, dtype, 512)
    held = [planes(m, n, [1] * 16, device), planes(m, n, [3, 2, 1, 1] * 5, device), planes(m, n, [1] * 64, device)]
    held += [plain(m, n, 20, dtype, device)]
    pool.drop(pool.put(planes(m, n, [4] * 16, device), 1.0))
    slots = [pool.put(a, 0.5 + i) for i, a in enumerate(held)]
    x = torch.randn(len(ids), n, device=device).to(dtype)
    ref = exact(x, w, None, 0.0)
    for i, a in enumerate(held):
        mine = torch.tensor(ids, device=device) == i
        ref[mine] = exact(x[mine], w, a, 0.5 + i)
    rows = batch.batch([-1 if i < 0 else slots[i] for i in ids], device)
    runs = [batch.linear_many(x, w, pool, rows) for _ in range(4)]
    return f"linear_many {code} {len(ids)}x{m}x{n}", dtype, error(runs, ref)


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix: Sylvester, or Paley's first construction for a prime order - 1 that is 3 mod 4."""
    if order & (order - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < order:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        return h
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    h = torch.eye(order, dtype=torch.float64)
    h[0, 1:], h[1:, 0] = 1, -1
    for i in range(q):
        for j in range(q):
            if i != j:
                h[i + 1, j + 1] = 1 if (i - j) % q in squares else -1
    return h


def other_cases(device: str) -> Iterator[Case]:
    """Walsh, sparse and DoRA ops."""
    for order, length, groups, m, rows in (
        (1, 4096, 1, 512, 3), (12, 128, 1, 300, 9), (1, 8, 25, 77, 2), (20, 512, 1, 128, 16), (1, 16384, 1, 64, 1),
    ):  # fmt: skip
        for op in ("transform", "spectral", "side", "shift", "restore"):
            yield partial(sparse_case, device, op, order, length, groups, m, rows)
    for code, m, n, dtype in (
        ("plain", 300, 520, torch.float32), ("nf4", 1024, 4096, torch.bfloat16), ("plain", 777, 264, torch.bfloat16),
    ):  # fmt: skip
        yield partial(norms_case, device, code, m, n, dtype)
    yield partial(compose_case, device)


def sparse_case(device: str, op: str, order: int, length: int, groups: int, m: int, rows: int) -> Result:
    """Run one Walsh or sparse op."""
    n, dtype = order * length * groups, torch.bfloat16 if order == 1 else torch.float32
    had, name = hadamard(order).to(device), f"{op} {order}x{length}x{groups} {rows}x{m}"
    x, y0 = torch.randn(rows, n, device=device).to(dtype), torch.randn(rows, m, device=device).to(dtype)
    index = torch.randperm(m * n)[: m * n // 30].sort().values.to(device)
    values = torch.randn(len(index), device=device)
    f = torch.zeros(m * n, dtype=torch.float64, device=device).index_copy_(0, index, values.double()).view(m, n)
    stored = sparse.by_rows(index, values, (m, n))
    if op in ("transform", "spectral"):
        u = torch.block_diag(*[torch.kron(had, hadamard(length).to(device))] * groups) / (order * length) ** 0.5
        z = x.double() @ u.t()
        if op == "transform":
            return name, torch.float32, error([walsh.transform(x, had.float(), length) for _ in range(3)], z)
        runs = [walsh.spectral(x, had.float(), length, stored, y0.clone(), 0.3) for _ in range(3)]
        return name, dtype, error(runs, y0.double() + 0.3 * z @ f.t())
    if op == "side":
        runs = [sparse.side(x, stored, y0.clone(), 0.3) for _ in range(3)]
        return name, dtype, error(runs, y0.double() + 0.3 * x.double() @ f.t())
    w = torch.randn(m, n, device=device).to(dtype)
    kept = w.clone()
    saved = sparse.shift(w, index, values, 0.5)
    if op == "shift":
        return name, dtype, error([w], kept.double() + 0.5 * f)
    sparse.overwrite(w, index, saved)
    return name, dtype, 0.0 if torch.equal(w, kept) else float("nan")


def norms_case(device: str, code: str, m: int, n: int, dtype: torch.dtype) -> Result:
    """Run the factored row norms."""
    w, a = base(m, n, code, dtype, device), planes(m, n, [1] * 16, device)
    p, core, q = (t.double() for t in unpack(a))
    want = (unpack_weight(w).double() + 0.7 * p @ core @ q).norm(dim=1)
    return f"row_norms {code} {m}x{n}", dtype, error([dora.row_norms(w, a, 0.7)], want)


def compose_case(device: str) -> Result:
    """Run the compose step."""
    b, d, gain, bias = (torch.randn(s, device=device) for s in ((33, 700), (33, 700), (700,), (700,)))
    want = gain.double() * (b.double() - bias.double() + 0.5 * d.double()) + bias.double()
    return "compose 33x700", torch.float32, error([dora.compose(b, d, gain, bias, 0.5)], want)


def poison() -> None:
    """Fill what torch.empty returns with nan, so that an element no kernel writes shows."""
    plain_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = plain_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty = empty
    torch.empty_like = lambda x, **kwargs: empty(x.shape, dtype=kwargs.get("dtype", x.dtype), device=x.device)


def check(device: str, shard: int = 0, shards: int = 1) -> tuple[int, list[str], dict[str, float]]:
    """Run every shards-th case from `shard` on: how many ran, the failures, the worst error of each dtype."""
    worst: dict[str, float] = {}
    failures, count = [], 0
    for i, case in enumerate(chain(linear_cases(device), many_cases(device), other_cases(device))):
        if i % shards == shard:
            torch.manual_seed(i)
            name, dtype, err = case()
            count += 1
            if not err <= BOUND[dtype]:
                failures.append(f"{name} {dtype}: {err}")
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), err)
    return count, failures, worst


if __name__ == "__main__":
    poison()
    print(json.dumps(check(sys.argv[1], *(int(a) for a in sys.argv[2:]))))
