"""The spectral delta against dense algebra, in distances, equality and the container."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import LowRank, Sparse, kind
from adaptc.errors import AdaptcError, FormatError
from adaptc.measure import distance2, norm2, relative_error
from adaptc.quant.walsh import name_for, transform
from adaptc.spectral import Spectral

SHAPES = {"sylvester": (6, 32), "paley": (5, 24), "block": (3, 18), "convolution": (4, 3, 2, 2)}


def spectral(shape: tuple[int, ...], seed: int = 0, count: int = 11, scale: float = 0.7) -> Spectral:
    g = torch.Generator().manual_seed(seed)
    width = torch.Size(shape[1:]).numel()
    at = torch.randperm(shape[0] * width, generator=g)[:count].sort().values
    return Spectral(at, torch.randn(count, generator=g), name_for(width), scale, shape)


@pytest.mark.parametrize("name", SHAPES)
def test_dense_apply_and_norm_agree_with_the_matrix(name: str) -> None:
    d = spectral(SHAPES[name])
    u = transform(d.transform, d.width).matrix()
    f = torch.zeros(d.shape[0] * d.width, dtype=torch.float64).index_copy_(0, d.indices, d.values.double())
    dw = 0.7 * f.view(d.shape[0], -1) @ u
    torch.testing.assert_close(d.dense(), dw.reshape(d.shape), rtol=1e-13, atol=1e-13)
    x = torch.randn(2, 3, d.width, dtype=torch.float64)
    torch.testing.assert_close(d.apply(x), x @ dw.T, rtol=1e-12, atol=1e-12)
    assert norm2(d) == pytest.approx(float(dw.square().sum()), rel=1e-12)


def test_distances_need_no_transform_within_one_basis_and_are_right_across_bases() -> None:
    x, y = spectral((6, 32)), spectral((6, 32), seed=3, count=20, scale=-0.2)
    others = [y, replace(y, transform="block:8"), Sparse(y.indices, y.values, y.scale, y.shape),
              LowRank(torch.randn(2, 32), torch.randn(6, 2), None, 1.0, (6, 32))]
    for other in others:
        expected = float((x.dense() - other.dense()).square().sum())
        assert distance2(x, other) == pytest.approx(expected, rel=1e-10)
        assert distance2(other, x) == pytest.approx(expected, rel=1e-10)
    assert relative_error(x, x) == 0.0


def test_a_basis_is_part_of_what_makes_two_adapters_the_same() -> None:
    x = spectral((6, 32))
    made = [Adapter({"a.weight": d}, {}, Origin("adaptc")) for d in (x, x, replace(x, transform="block:16"))]
    assert same(made[0], made[1])
    assert not same(made[0], made[2])
    assert adaptc.diff(made[0], made[2]).error > 0.1


def test_repr_and_kind_name_the_basis_and_never_show_data() -> None:
    d = spectral((5, 24))
    assert kind(d) == "spectral"
    assert repr(d) == "Spectral((5, 24), 11 of 120 in paley1:12, scale=0.7)"
    assert d.nbytes == 11 * 12


def test_the_container_keeps_it_bit_for_bit(tmp_path: Path) -> None:
    deltas = {f"l.{i}.weight": spectral((6, 24), seed=i) for i in range(3)} | {"m.weight": spectral((6, 32))}
    before = Adapter(deltas, {}, Origin("adaptc"))
    adaptc.save(before, tmp_path / "s.adaptc.safetensors")
    after = adaptc.load(tmp_path / "s.adaptc.safetensors")
    assert same(before, after)
    assert [d.transform for d in after.deltas.values()] == ["paley1:12"] * 3 + ["sylvester"]  # type: ignore[union-attr]


def test_a_file_with_a_transform_of_another_width_is_refused(tmp_path: Path) -> None:
    wrong = Adapter({"m.weight": replace(spectral((6, 32)), transform="paley1:12")}, {}, Origin("adaptc"))
    adaptc.save(wrong, tmp_path / "w.adaptc.safetensors")
    with pytest.raises(FormatError, match=r"m\.weight: transform 'paley1:12' does not exist at width 32"):
        adaptc.load(tmp_path / "w.adaptc.safetensors")


def test_peft_says_that_it_cannot_hold_it(tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match="spectral delta has no low-rank factors"):
        adaptc.save(Adapter({"m.weight": spectral((6, 32))}, {}, Origin("adaptc")), tmp_path / "p", dialect="peft")
