from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.base import Base
from adaptc.calibration import Calibration, Gradient, write_calibration
from adaptc.delta import Delta, Dense, LowRank, Sparse
from adaptc.errors import NeedsError
from adaptc.evidence.gradients import balanced, scores
from adaptc.prune.groups import Coupling, Part
from adaptc.prune.importance import CRITERIA, Merged, choose, column_energy, importance, row_energy
from adaptc.tensorfile import write_tensors

UP, DOWN = "m.up_proj.weight", "m.down_proj.weight"
SHAPES = {UP: (12, 7), DOWN: (7, 12)}
GROUP = Coupling(0, "ffn", 6, (Part(UP, 0, 2), Part(DOWN, 1, 2)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(key: str, seed: int, c: float = 1.0) -> LowRank:
    m, n = SHAPES[key]
    return LowRank(noise(3, n, seed=seed) / c, noise(m, 3, seed=seed + 1) * c, None, 0.5, (m, n))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    with (tmp_path / "model.safetensors").open("wb") as f:
        write_tensors(f, {k: noise(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}, {})
    return Base(tmp_path / "model.safetensors")


def statistics(path: Path, deltas: dict[str, LowRank], base: Base) -> Calibration:
    """Write the moments of some inputs, and importance under gradients that follow the factors' gauge."""
    moments, gradients = {}, {}
    for key, delta in deltas.items():
        n = SHAPES[key][1]
        x = noise(40, n, seed=9).double()
        moments[key] = x.T @ x / 40
        b, a = balanced(*delta.factors())
        grad = noise(*SHAPES[key], seed=5).double() * 0.01  # dL/dM
        gradients[key] = scores(base[key].double(), b, a, grad @ a.T, b.T @ grad)
    write_calibration(path, moments, {"tokens": 40}, gradients=gradients)
    return Calibration(path)


def dense(base: Base, deltas: dict[str, Delta], key: str) -> Tensor:
    return base[key].double() + (deltas[key].dense() if key in deltas else 0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_the_gauge(criterion: str, base: Base, tmp_path: Path) -> None:
    found = []
    for i, c in enumerate((1.0, 4.0, 0.25)):
        deltas = {UP: pair(UP, 3, c), DOWN: pair(DOWN, 7, c)}
        merged = Merged(base, deltas, SHAPES)
        found.append(importance(GROUP, criterion, merged,  # type: ignore[arg-type]
                                statistics(tmp_path / f"{i}.safetensors", deltas, base)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)
    assert float(found[0].std()) > 0


def test_magnitude_is_the_units_share_of_each_matrix(base: Base) -> None:
    deltas: dict[str, Delta] = {UP: pair(UP, 3), DOWN: pair(DOWN, 7)}
    up, down = (dense(base, deltas, k).square() for k in (UP, DOWN))
    expected = up.sum(1).reshape(6, 2).sum(1) / up.sum() + down.sum(0).reshape(6, 2).sum(1) / down.sum()
    torch.testing.assert_close(importance(GROUP, "magnitude", Merged(base, deltas, SHAPES)), expected)


def test_wanda_weighs_every_entry_by_its_input(base: Base, tmp_path: Path) -> None:
    deltas = {UP: pair(UP, 3), DOWN: pair(DOWN, 7)}
    known = statistics(tmp_path / "s.safetensors", deltas, base)
    expected = torch.zeros(6, dtype=torch.float64)
    for key, axis in ((UP, 1), (DOWN, 0)):
        loud = known.gram(key, SHAPES[key][1]).diagonal().sqrt()
        part = (dense(base, deltas, key).abs() * loud).sum(axis).reshape(6, 2).sum(1)  # type: ignore[arg-type]
        expected += part / (part.norm() + 1e-8)
    torch.testing.assert_close(importance(GROUP, "wanda", Merged(base, deltas, SHAPES), known), expected)


def test_adapter_is_how_far_it_moved_the_unit(base: Base) -> None:
    deltas: dict[str, Delta] = {DOWN: pair(DOWN, 7)}
    moved = deltas[DOWN].dense().square().sum(0).reshape(6, 2).sum(1)
    size = base[DOWN].double().square().sum(0).reshape(6, 2).sum(1)
    ratio = (moved / size).sqrt()
    torch.testing.assert_close(importance(GROUP, "adapter", Merged(base, deltas, SHAPES)),
                               ratio / (ratio.norm() + 1e-8))


@pytest.mark.parametrize("squared", [False, True])
def test_loraprune_takes_rows_of_up_and_columns_of_down(squared: bool, base: Base, tmp_path: Path) -> None:
    made = {k: Gradient(*(noise(n, seed=i).abs() for i, n in enumerate((m, n, m, n)))) for k, (m, n) in SHAPES.items()}
    write_calibration(tmp_path / "s.safetensors", {}, {}, gradients=made)
    found = importance(GROUP, "loraprune", Merged(base, {}, SHAPES), Calibration(tmp_path / "s.safetensors"),
                       squared=squared)
    up = (made[UP].rows2 if squared else made[UP].rows).double().reshape(6, 2).sum(1)
    down = (made[DOWN].cols2 if squared else made[DOWN].cols).double().reshape(6, 2).sum(1)
    torch.testing.assert_close(found, up / (up.norm() + 1e-8) + down / (down.norm() + 1e-8))


def test_deltas_without_factors_count_too(base: Base) -> None:
    w = noise(12, 7, seed=4)
    at = torch.tensor([3, 50])
    for delta in (Dense(w, 0.5, (12, 7)), Sparse(at, noise(2, seed=8), 2.0, (12, 7))):
        deltas: dict[str, Delta] = {UP: delta}
        up, down = dense(base, deltas, UP).square(), base[DOWN].double().square()
        expected = up.sum(1).reshape(6, 2).sum(1) / up.sum() + down.sum(0).reshape(6, 2).sum(1) / down.sum()
        torch.testing.assert_close(importance(GROUP, "magnitude", Merged(base, deltas, SHAPES)), expected)


def test_energies_come_from_grams_exactly() -> None:
    w, b, a = noise(9, 5).double(), noise(9, 2, seed=1).double(), noise(2, 5, seed=2).double()
    torch.testing.assert_close(row_energy(w, b, a), (w + b @ a).square().sum(1))
    torch.testing.assert_close(column_energy(w, b, a), (w + b @ a).square().sum(0))
    assert bool((row_energy(-b @ a, b, a) >= 0).all())


def test_the_estimate_is_one_step_of_descent_on_the_product() -> None:
    b, a, w = noise(6, 2).double(), noise(2, 5, seed=1).double(), noise(6, 5, seed=2).double()
    gb, ga = noise(6, 2, seed=3).double(), noise(2, 5, seed=4).double()
    estimate = -((b - gb) @ (a - ga) - b @ a)
    found = scores(w, b, a, gb, ga)
    entries = estimate * (w + b @ a)
    torch.testing.assert_close(found.rows, entries.abs().sum(1))
    torch.testing.assert_close(found.cols2, entries.square().sum(0))


@pytest.mark.parametrize(("criterion", "message"), [
    ("wanda", "criterion wanda needs calibration"), ("loraprune", "criterion loraprune needs calibration"),
    ("adapter", "the adapter changes none of up_proj, down_proj")])
def test_what_is_missing_is_named(criterion: str, message: str, base: Base) -> None:
    with pytest.raises(NeedsError, match=message):
        importance(GROUP, criterion, Merged(base, {}, SHAPES))  # type: ignore[arg-type]


def test_statistics_without_gradients_are_not_enough(base: Base, tmp_path: Path) -> None:
    write_calibration(tmp_path / "s.safetensors", {UP: torch.eye(7)}, {"tokens": 4})
    with pytest.raises(NeedsError, match="layer 0 ffn: calibration has no gradients of up_proj, down_proj"):
        importance(GROUP, "loraprune", Merged(base, {}, SHAPES), Calibration(tmp_path / "s.safetensors"))


def test_choosing_keeps_the_highest_of_every_run() -> None:
    points = torch.tensor([5.0, 1, 3, 3, 9, 8, 7, 6])
    assert choose(points, 3).tolist() == [4, 5, 6]
    assert choose(points, 4, blocks=2).tolist() == [0, 2, 4, 5]
    assert choose(points, 8).tolist() == list(range(8))
