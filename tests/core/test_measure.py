"""Distances from factors against dense algebra, for every kind that has factors and those that have none."""

from __future__ import annotations

import math

import pytest
import torch

from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError, NeedsError
from adaptc.lowrank import low_rank
from adaptc.measure import distance2, norm2, relative_error

SHAPE = (12, 30)


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(seed: int = 0, shape: tuple[int, ...] = SHAPE, core: bool = False) -> LowRank:
    m, n = shape[0], math.prod(shape[1:])
    return LowRank(t(4, n, seed=seed), t(m, 4, seed=seed + 1), t(4, 4, seed=seed + 2) if core else None, 0.7, shape)


DELTAS = {
    "lowrank": pair(),
    "core": pair(core=True),
    "conv": pair(shape=(12, 3, 5, 2)),
    "experts": LowRank(t(3, 2, 10), t(3, 12, 2), None, 0.5, (3, 12, 10)),
    "kron": Kron(Dense(t(3, 5), 1.0, (3, 5)), LowRank(t(2, 6), t(4, 2), None, 1.0, (4, 6)), 1.5, SHAPE),
    "kron full": Kron(Dense(t(3, 5), 1.0, (3, 5)), Dense(t(4, 6), 1.0, (4, 6)), 1.5, SHAPE),
    "kron conv": Kron(Dense(t(3, 1), 1.0, (3, 1)), LowRank(t(2, 30), t(4, 2), None, 1.0, (4, 3, 5, 2)), 2.0,
                      (12, 3, 5, 2)),
    "hadamard": Hadamard(pair(3), pair(5), 0.3, SHAPE),
    "sum": Sum((pair(7), pair(9, core=True)), SHAPE),
    "sparse": Sparse(torch.tensor([3, 77, 359]), t(3), 2.0, SHAPE),
    "dense": Dense(t(*SHAPE), 0.5, SHAPE),
    "mixed sum": Sum((pair(7), Sparse(torch.tensor([0, 5]), t(2), 1.0, SHAPE)), SHAPE),
}


@pytest.mark.parametrize("name", DELTAS)
def test_norm_and_distance_equal_dense_algebra(name: str) -> None:
    delta = DELTAS[name]
    dense = delta.dense()
    assert dense.shape == delta.shape
    assert norm2(delta) == pytest.approx(float(dense.square().sum()), rel=1e-10)
    other = pair(20, delta.shape) if name != "experts" else LowRank(t(3, 1, 10), t(3, 12, 1), None, 1.0, (3, 12, 10))
    expected = float((dense - other.dense()).square().sum())
    assert distance2(delta, other) == pytest.approx(expected, rel=1e-10)
    assert relative_error(delta, delta) <= 1e-12


@pytest.mark.parametrize("name", DELTAS)
def test_apply_is_the_product_with_dense(name: str) -> None:
    delta = DELTAS[name]
    if name == "experts":
        x = t(3, 7, 10).double()
        expected = x @ delta.dense().mT
    else:
        x = t(2, 7, math.prod(delta.shape[1:])).double()
        expected = x @ delta.dense().flatten(1).mT
    torch.testing.assert_close(delta.apply(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in DELTAS if n not in ("sparse", "dense", "mixed sum")])
def test_low_rank_factors_are_exact(name: str) -> None:
    factors = low_rank(DELTAS[name])
    assert factors is not None
    torch.testing.assert_close(factors.dense(), DELTAS[name].dense(), rtol=1e-12, atol=1e-12)


def test_deltas_without_factors_say_so() -> None:
    assert low_rank(DELTAS["sparse"]) is None
    assert low_rank(DELTAS["mixed sum"]) is None


def test_a_tiny_difference_keeps_its_digits() -> None:
    delta = pair()
    nudged = LowRank(delta.a, delta.b.double() * (1 + 1e-12), None, delta.scale, SHAPE)
    assert relative_error(delta, nudged) == pytest.approx(1e-12, rel=1e-3)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(FormatError, match="shapes"):
        distance2(pair(), pair(shape=(30, 12)))


def test_zero_deltas() -> None:
    zero = LowRank(t(4, 30), torch.zeros(12, 4), None, 1.0, SHAPE)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, pair()) == math.inf
    gone = LowRank(torch.empty(0, 30), torch.empty(12, 0), None, 1.0, SHAPE)
    assert relative_error(pair(), gone) == 1.0


def test_base_dependent_deltas_refuse_to_be_dense() -> None:
    dora = NeedsBase("dora", {"magnitude": torch.ones(12)}, {"axis": 0}, SHAPE, pair())
    with pytest.raises(NeedsError, match="dora"):
        dora.dense()
    assert norm2(dora) == norm2(pair())
