from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.base import Base
from adaptc.calibration import Calibration, write_calibration
from adaptc.delta import LowRank
from adaptc.errors import NeedsError
from adaptc.prune.cuts import Cut
from adaptc.prune.importance import Merged
from adaptc.prune.refit import removal
from adaptc.tensorfile import write_tensors

KEY, M, N, TOKENS = "down.weight", 5, 9, 400
CUT = Cut((M, N), cols=torch.tensor([0, 1, 3, 4, 7, 8]))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int) -> Tensor:
    """Return inputs that say much about each other."""
    return noise(TOKENS, 4, seed=seed) @ noise(4, N, seed=99) + 0.3 * noise(TOKENS, N, seed=seed + 1)


@pytest.fixture
def weights(tmp_path: Path) -> Merged:
    with (tmp_path / "model.safetensors").open("wb") as f:
        write_tensors(f, {KEY: noise(M, N, seed=7)}, {})
    delta = LowRank(noise(2, N, seed=8), noise(M, 2, seed=9), None, 0.5, (M, N))
    return Merged(Base(tmp_path / "model.safetensors"), {KEY: delta}, {KEY: (M, N)})


@pytest.fixture
def known(tmp_path: Path) -> Calibration:
    x, y = inputs(1), inputs(5)
    write_calibration(tmp_path / "s.safetensors", {KEY: x.T @ x / TOKENS}, {"tokens": TOKENS, "held_tokens": TOKENS},
                      held={KEY: y.T @ y / TOKENS})
    return Calibration(tmp_path / "s.safetensors")


def outputs(weights: Merged, x: Tensor, small: Tensor) -> tuple[float, float]:
    """Return E||M x - M' x_K||^2 and E||M x||^2, M' being the new base weight with the adapter's columns."""
    delta = weights.deltas[KEY].dense()
    whole = x @ (weights.base[KEY].double() + delta).T
    part = x[:, CUT.cols] @ (small + delta[:, CUT.cols]).T
    return float((whole - part).square().sum() / TOKENS), float(whole.square().sum() / TOKENS)


@pytest.mark.parametrize("refit", [False, True])
def test_losses_are_those_of_the_tokens_themselves(refit: bool, weights: Merged, known: Calibration) -> None:
    made, losses = removal(weights, known, KEY, CUT, refit=refit)
    small = made if made is not None else CUT.slice(weights.base[KEY].double())
    for loss, x in zip(losses, (inputs(1), inputs(5)), strict=True):
        lost, total = outputs(weights, x, small)
        assert loss.lost == pytest.approx(lost, rel=1e-5)
        assert loss.total == pytest.approx(total, rel=1e-5)
    assert [x.split for x in losses] == ["train", "held"]


def test_the_repair_is_the_least_squares_solution(weights: Merged, known: Calibration) -> None:
    x = inputs(1)
    delta = weights.deltas[KEY].dense()
    target = x @ (weights.base[KEY].double() + delta).T
    best = torch.linalg.lstsq(x[:, CUT.cols], target).solution.T - delta[:, CUT.cols]
    made, losses = removal(weights, known, KEY, CUT, refit=True)
    assert made is not None
    torch.testing.assert_close(made, best, rtol=2e-2, atol=2e-2)  # damped by 1e-4 of the mean diagonal
    assert losses[0].lost <= outputs(weights, x, best)[0] * 1.001
    before = removal(weights, known, KEY, CUT)[1]
    assert losses[0].lost < 0.5 * before[0].lost


def test_inputs_that_others_say_exactly_cost_nothing(weights: Merged, tmp_path: Path) -> None:
    x = noise(TOKENS, 3, seed=3) @ noise(3, N, seed=4)
    write_calibration(tmp_path / "t.safetensors", {KEY: x.T @ x / TOKENS}, {"tokens": TOKENS})
    _, losses = removal(weights, Calibration(tmp_path / "t.safetensors"), KEY, CUT, refit=True)
    assert losses[0].lost < 1e-3 * losses[0].total


def test_a_diagonal_tells_losses_but_repairs_nothing(weights: Merged, tmp_path: Path) -> None:
    write_calibration(tmp_path / "d.safetensors", {KEY: torch.arange(1.0, N + 1)}, {"tokens": 3})
    diagonal = Calibration(tmp_path / "d.safetensors")
    made, losses = removal(weights, diagonal, KEY, CUT)
    merged = weights.base[KEY].double() + weights.deltas[KEY].dense()
    gone = [i for i in range(N) if i not in CUT.cols.tolist()]  # type: ignore[union-attr]
    assert made is None
    assert losses[0].lost == pytest.approx(float((merged.square() * torch.arange(1.0, N + 1))[:, gone].sum()), rel=1e-6)
    with pytest.raises(NeedsError, match="only the diagonal"):
        removal(weights, diagonal, KEY, CUT, refit=True)
