"""Calibration files: what is written is what is asked for, by name and split; energies against sums over tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.calibration import Calibration, Gradient, write_calibration
from adaptc.delta import LowRank, Sparse
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.output_error import output_errors
from adaptc.tensorfile import write_tensors

Q, K, D = "model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight", "model.layers.0.down_proj.weight"


def tokens(n: int, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)


X, X_HELD = tokens(6, 40, 1), tokens(6, 9, 2)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.fixture
def stats(tmp_path: Path) -> Calibration:
    grad = Gradient(torch.arange(5.0), torch.arange(6.0), torch.ones(5), torch.ones(6))
    write_calibration(tmp_path / "s.safetensors", {Q: moment(X), D: X.square().mean(0)},
                      {"tokens": 40, "held_tokens": 9, "shared": {K: Q}, "counts": {D: {"tokens": 3}}},
                      held={Q: moment(X_HELD)}, gradients={Q: grad})
    return Calibration(tmp_path / "s.safetensors")


def test_what_was_written_is_found_by_name_split_and_alias(stats: Calibration) -> None:
    for name in (Q, K, Q.removeprefix("model."), f"outer.{Q}", K[6:]):
        assert torch.allclose(stats.gram(name, 6), moment(X), rtol=1e-6)
        assert torch.allclose(stats.gram(name, 6, "held"), moment(X_HELD), rtol=1e-6)
    assert stats.gram(D, 6).shape == (6,)
    assert stats.gram(Q, 6).dtype == torch.float64
    assert stats.moment(D, "held") is None
    assert stats.moment("model.layers.1.q_proj.weight") is None
    assert set(stats.parameters) == {Q, K, D}
    found = stats.gradient(Q, (5, 6))
    assert found is not None
    assert found.cols.tolist() == [0, 1, 2, 3, 4, 5]
    assert stats.gradient(D) is None
    assert (stats.tokens(), stats.tokens("held"), stats.tokens("train", D)) == (40, 9, 3)


def test_energies_are_means_over_tokens(stats: Calibration) -> None:
    dw = tokens(6, 4, 5)
    b, a = tokens(2, 4, 6), tokens(6, 2, 7)
    assert stats.energy(Q, dw) == pytest.approx(float((X @ dw.T).square().sum(1).mean()), rel=1e-6)
    assert stats.energy(K, dw, "held") == pytest.approx(float((X_HELD @ dw.T).square().sum(1).mean()), rel=1e-6)
    assert stats.output_energy(Q, b, a, "held") == pytest.approx(stats.energy(Q, b @ a, "held"), rel=1e-9)
    assert stats.energy(D, dw) == pytest.approx(float((dw.square() * X.square().mean(0)).sum()), rel=1e-6)


def test_output_errors_on_both_splits(stats: Calibration) -> None:
    b, a = tokens(2, 4, 6), tokens(6, 2, 7)
    before = LowRank(a, b, None, 0.5, (4, 6))
    after = Sparse(torch.tensor([1, 8]), torch.tensor([0.3, -2.0]), 1.0, (4, 6))
    smaller = LowRank(a[:1], b[:, :1], None, 0.5, (4, 6))
    for what in (after, smaller, after.dense()):
        dense = what if isinstance(what, Tensor) else what.dense()
        found = output_errors(stats, Q, before, what)
        for split, x in (("train", X), ("held", X_HELD)):
            left = (x @ (before.dense() - dense).T).norm() / (x @ before.dense().T).norm()
            assert found[split] == pytest.approx(float(left), rel=1e-5)  # type: ignore[index]
    assert output_errors(stats, Q, before, None) == {"train": 1.0, "held": 1.0}
    assert list(output_errors(stats, D, before, smaller)) == ["train"]
    with pytest.raises(NeedsError, match="no statistics of other"):
        output_errors(stats, "other.weight", before, None)


def test_what_statistics_cannot_answer(stats: Calibration, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"shape \(6, 6\), the layer has 7 inputs"):
        stats.gram(Q, 7)
    with pytest.raises(NeedsError, match="no held-out statistics"):
        stats.gram(D, 6, "held")
    with pytest.raises(FormatError, match=r"shape \(5, 6\), the layer has \(4, 6\)"):
        stats.gradient(Q, (4, 6))
    assert "40 calibration tokens for 64 inputs" in (stats.short(Q, 64) or "")
    assert stats.short(Q, 6) is None
    assert stats.short(D, 64) is None  # a diagonal has no span
    write_calibration(tmp_path / "none.safetensors", {Q: torch.zeros(6, 6)}, {"tokens": 0})
    with pytest.raises(NeedsError, match="seen 0 tokens"):
        Calibration(tmp_path / "none.safetensors").gram(Q, 6)
    with pytest.raises(UsageError, match="exists"):
        write_calibration(tmp_path / "none.safetensors", {}, {})
    write_calibration(tmp_path / "odd.safetensors", {Q: -torch.eye(6)}, {})
    with pytest.raises(FormatError, match="no second moments"):
        Calibration(tmp_path / "odd.safetensors").gram(Q, 6)


@pytest.mark.parametrize("metadata", ["[1]", "{", json.dumps({"shared": {"a": 1}}), json.dumps({"counts": [2]})])
def test_metadata_that_is_no_account(metadata: str, tmp_path: Path) -> None:
    with (tmp_path / "s.safetensors").open("wb") as f:
        write_tensors(f, {f"{Q}.x2": torch.ones(3)}, {"adaptc.calibration": metadata})
    with pytest.raises(FormatError, match=r"metadata adaptc\.calibration"):
        Calibration(tmp_path / "s.safetensors")
