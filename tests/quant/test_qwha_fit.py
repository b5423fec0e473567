"""Allocation, selection and refinement of spectral coefficients against plain least squares on samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.quant.qwha_fit import allocate, keep, sizes_of
from adaptc.quant.walsh import name_for, transform

M, N, TOKENS = 9, 24, 200


class Layer:
    """A change dw on inputs x with one loud direction, and everything the fit works on, from dense algebra."""

    def __init__(self, width: int = N, damping: float = 1e-4) -> None:
        g = torch.Generator().manual_seed(width)
        self.x = torch.randn(width, TOKENS, generator=g, dtype=torch.float64)
        self.x += 3 * torch.randn(width, 1, generator=g, dtype=torch.float64) @ self.x[:1]
        self.dw = torch.randn(M, width, generator=g, dtype=torch.float64) * torch.linspace(0.3, 2, M)[:, None]
        c = self.x @ self.x.T / TOKENS
        self.c = c + damping * c.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        self.u = transform(name_for(width), width).matrix()
        self.x0, self.gram = self.dw @ self.u.T, self.u @ self.c @ self.u.T
        self.through = self.x0 @ self.gram

    def rows(self, at: Tensor, values: Tensor) -> Tensor:
        """Coefficients F dense."""
        return torch.zeros(M * self.x0.shape[1], dtype=torch.float64).index_copy_(0, at, values).view(M, -1)

    def errors(self, f: Tensor) -> Tensor:
        """Damped output error of every row, from the weights."""
        left = self.dw - f @ self.u
        return ((left @ self.c) * left).sum(1)


@pytest.fixture(params=[24, 32, 18], ids=["paley", "sylvester", "block"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


def test_a_budget_is_spent_to_the_last_coefficient_and_larger_errors_get_no_less() -> None:
    g = torch.Generator().manual_seed(0)
    for trial in range(60):
        m, n = int(torch.randint(1, 40, (1,), generator=g)), int(torch.randint(1, 30, (1,), generator=g))
        sizes = torch.rand(m, generator=g) ** (1 + trial % 5)
        budget = int(torch.randint(0, m * n + 1, (1,), generator=g))
        counts = allocate(sizes, budget, n, exponent=(0, 0.5, 1, 2)[trial % 4])
        assert int(counts.sum()) == budget
        assert 0 <= int(counts.min()) <= int(counts.max()) <= n
        by_size = counts[sizes.argsort()]
        assert bool((by_size[1:] - by_size[:-1] >= -1).all())  # only the last units may go against the order


def test_equal_shares_where_the_exponent_is_zero_or_nothing_is_wrong() -> None:
    sizes = torch.tensor([5.0, 1.0, 0.0, 2.0])
    assert sorted(allocate(sizes, 10, 8, exponent=0).tolist()) == [2, 2, 3, 3]
    assert allocate(torch.zeros(3), 6, 8).tolist() == [2, 2, 2]


def test_what_a_full_row_cannot_take_goes_evenly_to_the_others_and_the_rest_to_the_smallest() -> None:
    assert allocate(torch.tensor([90.0, 5.0, 5.0]), 20, 8).tolist() == [8, 6, 6]  # 18, 1, 1: ten freed, five each
    assert allocate(torch.tensor([4.0, 3.0, 3.0]), 11, 8).tolist() == [4, 4, 3]  # 4.4, 3.3, 3.3
    with pytest.raises(UsageError, match="budget of 25 coefficients does not fit 3 x 8"):
        allocate(torch.ones(3), 25, 8)


def test_sizes_are_those_of_the_outputs_or_of_the_weights(layer: Layer) -> None:
    outputs = (layer.dw @ layer.c @ layer.dw.T).diagonal().sqrt()
    torch.testing.assert_close(sizes_of(layer.x0, layer.through, "activation"), outputs)
    torch.testing.assert_close(sizes_of(layer.x0, layer.through, "weight"), layer.dw.norm(dim=1))
    assert sizes_of(layer.x0, layer.through, "even").tolist() == [1.0] * M


def test_values_are_the_least_squares_solution_on_the_inputs(layer: Layer) -> None:
    """The root form of the paper: c = v B_S^T (B_S B_S^T)^-1 with v = dw_i R, B = U R, R R^T = C."""
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 5, 7, 9])
    at, values = keep(layer.x0, layer.gram, counts, "energy", layer.through)
    f = layer.rows(at, values)
    assert bool((at[1:] > at[:-1]).all())
    assert (f != 0).sum(1).tolist() == counts.tolist()
    root = torch.linalg.cholesky(layer.c)
    v, b = layer.dw @ root, layer.u @ root
    for i in range(M):
        s = f[i].nonzero()[:, 0]
        expected = torch.linalg.lstsq(b[s].T, v[i]).solution if len(s) else torch.empty(0, dtype=torch.float64)
        torch.testing.assert_close(f[i, s], expected, rtol=1e-4, atol=1e-6)
        fit = f[i, s] @ b[s]
        left = v[i] - fit
        assert float((b[s] @ left).abs().max() if len(s) else 0.0) < 1e-4 * float(v[i].norm() * b.norm())
        assert float(v[i] @ v[i]) == pytest.approx(float(fit @ fit + left @ left), rel=1e-5)


def test_refined_rows_are_never_worse_than_unrefined_ones_or_than_nothing(layer: Layer) -> None:
    counts = torch.full((M,), 5)
    for selection in ("energy", "coefficient"):
        plain = layer.rows(*keep(layer.x0, layer.gram, counts, selection))
        fine = layer.rows(*keep(layer.x0, layer.gram, counts, selection, layer.through))
        assert torch.equal(plain != 0, fine != 0)
        none = layer.errors(torch.zeros_like(fine))
        assert bool((layer.errors(fine) <= layer.errors(plain) * (1 + 1e-9)).all())
        assert bool((layer.errors(fine) < none).all())
        torch.testing.assert_close(plain[plain != 0], layer.x0[plain != 0])


def test_selection_takes_the_largest(layer: Layer) -> None:
    counts = torch.full((M,), 4)
    size = layer.gram.diagonal().sqrt()
    for selection, score in (("coefficient", layer.x0.abs()), ("energy", layer.x0.abs() * size)):
        f = layer.rows(*keep(layer.x0, layer.gram, counts, selection))
        assert bool((score[f != 0].view(M, 4).amin(1) >= (score * (f == 0)).amax(1)).all())


def test_rounds_nest_and_each_adds_the_steepest(layer: Layer) -> None:
    counts = torch.full((M,), 6)
    half = layer.rows(*keep(layer.x0, layer.gram, counts // 2, "energy", layer.through))
    both = layer.rows(*keep(layer.x0, layer.gram, counts, "energy", layer.through, rounds=2))
    slope = ((layer.x0 - half) @ layer.gram).abs() / layer.gram.diagonal().sqrt()
    for i in range(M):
        first, all_ = set(half[i].nonzero()[:, 0].tolist()), set(both[i].nonzero()[:, 0].tolist())
        assert first < all_
        left = [j for j in slope[i].argsort(descending=True).tolist() if j not in first]
        assert all_ - first == set(left[:3])
    assert bool((layer.errors(both) <= layer.errors(half) * (1 + 1e-9)).all())


def test_errors_do_not_grow_along_nested_supports_and_end_at_zero(layer: Layer) -> None:
    n, before = layer.x0.shape[1], layer.errors(torch.zeros_like(layer.x0))
    for count in (2, 5, 9, n):
        f = layer.rows(*keep(layer.x0, layer.gram, torch.full((M,), count), "coefficient", layer.through))
        after = layer.errors(f)
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after
    assert float(after.max()) < 1e-8
    torch.testing.assert_close(f @ layer.u, layer.dw, rtol=1e-3, atol=1e-3)


def test_many_rows_of_many_counts_are_what_they_are_alone() -> None:
    layer = Layer(32)
    counts = torch.arange(M) * 3
    f = layer.rows(*keep(layer.x0, layer.gram, counts, "energy", layer.through))
    for i in range(M):
        at, values = keep(layer.x0[i : i + 1], layer.gram, counts[i : i + 1], "energy", layer.through[i : i + 1])
        torch.testing.assert_close(f[i, at], values, rtol=1e-12, atol=1e-12)


def test_no_coefficients_and_statistics_that_are_none() -> None:
    layer = Layer(24)
    at, values = keep(layer.x0, layer.gram, torch.zeros(M, dtype=torch.long), "energy", layer.through)
    assert at.numel() == values.numel() == 0
    with pytest.raises(FormatError, match="not positive"):
        keep(layer.x0, -layer.gram, torch.full((M,), 3), "energy", layer.through)
