from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, exact, plain, planes
from torch import Tensor

from adaptc.errors import UnsupportedError, UsageError
from adaptc.kernels.batch import batch, linear_many
from adaptc.kernels.pool import PAGE, Pool
from adaptc.kernels.resident import unpack

MIXED = [0, 1, -1, 2, 1]
LONG = [0] * 40 + [-1] * 3 + [1, 2] * 2 + [1] * 20


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("ids", "code", "kinds"),
    [
        (MIXED, "nf4", "planes"),
        (MIXED, "plain", "plain"),
        (MIXED, "nf4", "both"),
        (LONG, "plain", "planes"),
        (LONG, "nf4", "both"),
    ],
)
def test_each_row_runs_through_its_own_adapter(
    ids: list[int], code: str, kinds: str, close: Callable[[Tensor, Tensor], None]
) -> None:
    m, n = 40, 520
    few, many = planes(m, n, [1] * 5), planes(m, n, [2, 1] * 8)
    held = {"planes": [few, many, few], "plain": [plain(m, n, r, torch.float16) for r in (3, 20, 1)]}
    held["both"] = [few, many, plain(m, n, 20, torch.float16)]
    w, pool = base(m, n, code), Pool(256, 8)
    pool.drop(pool.put(few, 1.0))
    slots = [pool.put(a, 0.5 + i) for i, a in enumerate(held[kinds])]
    x = torch.randn(len(ids), n)
    want = torch.stack([exact(x[i], w, None if j < 0 else held[kinds][j], 0.5 + j) for i, j in enumerate(ids)])
    close(linear_many(x, w, pool, batch([-1 if j < 0 else slots[j] for j in ids])), want)


def test_the_naive_form_agrees(monkeypatch: pytest.MonkeyPatch, close: Callable[[Tensor, Tensor], None]) -> None:
    monkeypatch.setenv("ADAPTC_KERNELS", "naive")
    w, pool, a, x = base(33, 100, "int4"), Pool(64, 2), planes(33, 100, [3, 1]), torch.randn(4, 100)
    slot, bias = pool.put(a, 0.5), torch.randn(33)
    want = torch.stack([exact(x[i], w, a if i % 2 else None, 0.5, bias) for i in range(4)])
    close(linear_many(x, w, pool, batch([-1, slot, -1, slot]), bias), want)


@pytest.mark.parametrize("kind", ["planes", "plain"])
def test_a_pool_gives_back_what_it_took_in(kind: str) -> None:
    pool = Pool(200, 4, entries=128)
    a = planes(700, 1300, [2] * 12) if kind == "planes" else plain(700, 600, 9, torch.float16)
    other = pool.put(planes(100, 100, [1]), 1.0)
    free = pool.free
    slot = pool.put(a, 2.0)
    assert all(torch.equal(g, w) for g, w in zip(unpack(pool.get(slot)), unpack(a), strict=True))
    pool.drop(slot)
    assert pool.free == free
    assert pool.shape(other) == (100, 100)


def test_an_adapter_takes_its_pages_and_no_more() -> None:
    pool = Pool(64, 1)
    pool.put(planes(1024, 4096, [1] * 16), 1.0)
    assert 64 - pool.free == (1024 + 4096) // PAGE + 1


def test_a_full_pool_and_a_wrong_batch_are_refused() -> None:
    pool = Pool(4, 2)
    slot = pool.put(planes(40, 64, [1]), 1.0)
    with pytest.raises(UsageError, match="takes 3 pages and a slot, 1 and 1 are free"):
        pool.put(planes(40, 64, [1]), 1.0)
    with pytest.raises(UsageError, match="slot 0 holds no adapter"):
        Pool(4, 2).drop(0)
    with pytest.raises(UsageError, match="2 rows, the batch describes 1"):
        linear_many(torch.zeros(2, 64), base(40, 64, "plain"), pool, batch([slot]))
    with pytest.raises(UnsupportedError, match=r"adapter for \(40, 64\)"):
        linear_many(torch.zeros(1, 128), base(40, 128, "plain"), pool, batch([slot]))
    with pytest.raises(UnsupportedError, match="a slot lists 2"):
        Pool(8, 1, entries=2).put(planes(40, 64, [1]), 1.0)


def test_runs_never_cross_a_tile_and_name_every_row_once() -> None:
    slots = [3] * 100 + [-1] * 5 + [1, 2] * 20
    rows = batch(slots)
    seen = [slot for slot, lo, hi in rows.runs.tolist() for _ in range(lo, hi)]
    assert seen == slots
    assert rows.each.tolist() == slots
    assert all(lo // 64 == (hi - 1) // 64 for _, lo, hi in rows.runs.tolist())
    assert [rows.runs[i, 1].item() for i in rows.first[:-1]] == [0, 64, 128]
