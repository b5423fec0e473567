"""Masks: the highest scores block by block are those of the whole matrix, draws are seeded, budgets sum up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaptc.delta import Dense, Hadamard, Kron, LowRank, Sparse, Sum
from adaptc.prune import mask
from adaptc.prune import view as views
from adaptc.prune.view import blocks, view


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low(m: int = 30, n: int = 40, r: int = 3, seed: int = 0) -> LowRank:
    return LowRank(t(r, n, seed=seed), t(m, r, seed=seed), None, 0.5, (m, n))


SPARSE = Sparse(torch.tensor([0, 41, 77, 1199]), t(4), 2.0, (30, 40))
DELTAS = {
    "lowrank": low(), "core": LowRank(t(3, 40), t(30, 2), t(2, 3), -1.0, (30, 40)),
    "dense": Dense(t(30, 40), 0.5, (30, 40)), "kernel": Dense(t(30, 10, 2, 2), 0.5, (30, 10, 2, 2)),
    "kron": Kron(Dense(t(3, 4), 1.0, (3, 4)), low(10, 10), 2.0, (30, 40)),
    "hadamard": Hadamard(low(seed=1), low(seed=2), 2.0, (30, 40)), "sparse": SPARSE,
    "empty": Sparse(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1.0, (30, 40)),
    "sum": Sum((low(seed=3), SPARSE, Dense(t(30, 40, seed=4), 1.0, (30, 40))), (30, 40)),
}


@pytest.mark.parametrize("name", DELTAS)
def test_a_view_sees_the_dense_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "BLOCK", 280)  # seven rows a block
    monkeypatch.setattr(views, "_GATHER", 9)
    seen, dense = view(DELTAS[name]), DELTAS[name].dense().reshape(30, 40)
    assert len(list(blocks(seen))) == 5
    torch.testing.assert_close(torch.cat([seen.rows(*b) for b in blocks(seen)]).double(), dense, rtol=1e-5, atol=1e-5)
    places = torch.tensor([0, 3, 41, 77, 500, 1198, 1199])
    torch.testing.assert_close(seen.at(places), dense.reshape(-1)[places], rtol=1e-12, atol=1e-12)
    assert seen.at(places[:0]).shape == (0,)
    assert seen.energy() == pytest.approx(float(dense.square().sum()), rel=1e-5, abs=1e-300)


@pytest.mark.parametrize("k", [0, 1, 7, 100, 1199, 1200, 5000])
def test_the_largest_of_blocks_are_the_largest_of_all(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "BLOCK", 100)
    seen = view(Dense(t(30, 40), 1.0, (30, 40)))
    found = mask.largest(mask.scores(seen), k)
    assert torch.equal(found, t(30, 40).abs().flatten().topk(min(k, 1200)).indices.sort().values)


def test_of_equal_scores_the_first_win_and_zeros_never() -> None:
    def some() -> Iterator[tuple[int, torch.Tensor]]:
        yield from ((0, torch.tensor([0.0, 2, 1, 1])), (4, torch.tensor([1.0, 1, 0, 1])), (8, torch.tensor([1.0, 3])))

    assert mask.largest(some(), 4).tolist() == [1, 2, 3, 9]
    assert mask.largest(some(), 20).tolist() == [1, 2, 3, 4, 5, 7, 8, 9]


def test_scores_weigh_inputs_and_base() -> None:
    seen, dense = view(DELTAS["dense"]), DELTAS["dense"].dense()
    norms, w0 = torch.rand(40), t(30, 40, seed=9)
    for given, wanted in (((norms, None), dense.abs() * norms), ((None, w0), (dense * w0).abs())):
        made = torch.cat([s for _, s in mask.scores(seen, *given)])
        torch.testing.assert_close(made.double(), wanted.double().flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("total", [0, 1, 10, 333, 1000, 2399, 2400, 9999])
def test_shares_of_one_budget_sum_up_and_follow_the_scores(total: int) -> None:
    both = [Dense(t(30, 40) * s, 1.0, (30, 40)) for s in (1.0, 3.0)]
    counts = mask.shares([mask.classes(mask.scores(view(d))) for d in both], total)
    assert sum(counts) == min(total, 2400)
    together = torch.cat([d.dense().abs().flatten() for d in both])
    best = together.topk(min(total, 2400)).indices
    assert counts[0] == pytest.approx(int((best < 1200).sum()), abs=12)  # the last class is 0.8 % wide


def test_draws_are_uniform_seeded_and_of_their_own_module() -> None:
    for k in (0, 1, 50, 1000, 1200):
        made = mask.drawn("q", 30, 40, k, 5)
        assert made.dtype == torch.int64
        assert len(made) == k
        assert bool((made[1:] > made[:-1]).all())
        assert torch.equal(made, mask.drawn("q", 30, 40, k, 5))
    assert not torch.equal(mask.drawn("q", 30, 40, 50, 5), mask.drawn("v", 30, 40, 50, 5))
    assert not torch.equal(mask.drawn("q", 30, 40, 50, 5), mask.drawn("q", 30, 40, 50, 6))
    hits = np.bincount(np.concatenate([mask.drawn("q", 10, 10, 10, s).numpy() for s in range(600)]), minlength=100)
    assert hits.min() > 30
    assert hits.max() < 95  # 60 +- 7.3 each


@pytest.mark.parametrize(("m", "n", "k"), [(30, 40, 200), (40, 30, 200), (30, 40, 5), (30, 40, 30), (30, 40, 1200),
                                           (4, 4, 0)])
def test_structured_masks_are_a_diagonal_rows_and_columns(m: int, n: int, k: int) -> None:
    made = mask.struct(m, n, k)
    assert len(made) == k
    assert len(made.unique()) == k
    chosen = torch.zeros(m, n)
    chosen.view(-1)[made] = 1
    if k >= min(m, n):
        assert bool(chosen.diagonal().all())
    if k == 200:
        assert int((chosen.sum(1) == n).sum()) >= 2
        assert int((chosen.sum(0) == m).sum()) == 2
