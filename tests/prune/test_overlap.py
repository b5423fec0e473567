"""Overlap of sparse deltas against dense algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank, Sparse
from adaptc.prune import overlap as module
from adaptc.prune.overlap import overlap
from adaptc.squeeze.compare import compare


def sparse(m: int, n: int, k: int, seed: int, scale: float = 1.0) -> Sparse:
    random = torch.Generator().manual_seed(seed)
    places = torch.randperm(m * n, generator=random)[:k].sort().values
    return Sparse(places, torch.randn(k, generator=random), scale, (m, n))


@pytest.mark.parametrize(("m", "n", "k"), [(30, 40, 60), (40, 30, 400), (25, 2, 9), (6, 1, 3), (1, 50, 20),
                                           (30, 40, 1200)])
def test_equals_dense_algebra(m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 100)
    x, y = sparse(m, n, k, 1, 0.5), sparse(m, n, k, 2, -2.0)
    dx, dy = x.dense().numpy(), y.dense().numpy()
    found = overlap(x, y)
    product = dx.T @ dy
    assert found.awom == pytest.approx(np.linalg.norm(product, 2), rel=1e-8, abs=1e-12)
    assert found.awor == pytest.approx(1 - (np.abs(dx.T) @ np.abs(dy) > 0).sum() / n**2, abs=1e-12)
    assert found.dot == pytest.approx((dx * dy).sum(), abs=1e-10)
    assert found.common == ((dx != 0) & (dy != 0)).sum()
    assert found.conflicts == (dx * dy < 0).sum()
    back = overlap(y, x)
    assert (back.common, back.conflicts) == (found.common, found.conflicts)
    assert back.awom == pytest.approx(found.awom, rel=1e-8, abs=1e-12)
    assert back.awor == pytest.approx(found.awor)


def test_supports_without_a_common_row_are_orthogonal() -> None:
    x = Sparse(torch.tensor([0, 5, 11]), torch.ones(3), 1.0, (4, 6))
    y = Sparse(torch.tensor([12, 17, 23]), torch.ones(3), 1.0, (4, 6))
    found = overlap(x, y)
    assert (found.awom, found.awor, found.common, found.dot) == (0.0, 1.0, 0, 0.0)
    empty = Sparse(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1.0, (4, 6))
    assert overlap(x, empty).awom == 0.0


def test_of_a_delta_with_itself_it_is_the_square_of_its_norm() -> None:
    x = sparse(30, 40, 100, 3)
    found = overlap(x, x)
    assert found.awom == pytest.approx(float(torch.linalg.matrix_norm(x.dense(), 2)) ** 2, rel=1e-8)
    assert (found.common, found.conflicts) == (100, 0)


def test_compare_shows_it_for_sparse_adapters() -> None:
    x, y = sparse(30, 40, 300, 1), sparse(30, 40, 600, 2)
    low = LowRank(torch.randn(2, 40), torch.randn(30, 2), None, 1.0, (30, 40))

    def adapter(delta: object, other: object = low) -> Adapter:
        return Adapter({"l.0.weight": delta, "l.1.weight": other}, {}, Origin("peft"))  # type: ignore[dict-item]

    found = compare([adapter(x), adapter(y)], ("x", "y"))
    pair, rest, total = found.modules[0].pairs[0, 1], found.modules[1].pairs[0, 1], found.totals[0, 1]
    o = overlap(x, y)
    assert (pair.awom, pair.awor, pair.common) == (o.awom, o.awor, o.common / 300)
    dx, dy = x.dense(), y.dense()
    assert pair.cosine == pytest.approx(float((dx * dy).sum() / dx.norm() / dy.norm()))
    assert pair.conflict == o.conflicts / o.common
    assert math.isnan(pair.shared_output)
    assert (rest.awom, rest.common) == (None, None)
    assert (total.awom, total.awor) == (o.awom, o.awor)
    assert total.shared_output == rest.shared_output  # the mean over modules that have it
    assert found.modules[0].norms == pytest.approx((float(dx.norm()), float(dy.norm())))
    mixed = compare([adapter(x), adapter(low)], ("x", "low")).modules[0].pairs[0, 1]
    assert mixed.awom is None
    assert mixed.cosine == pytest.approx(float((dx * low.dense()).sum() / dx.norm() / low.dense().norm()))
