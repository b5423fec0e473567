"""The truncated SVD from factors against the dense one, on easy and nasty factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.squeeze.factored import core_svd, spectrum, truncate
from adaptc.squeeze.rsvd import core_rsvd

M, N, R = 96, 130, 16


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(kind: str) -> tuple[Tensor, Tensor]:
    b, a = gaussian(M, R, seed=1), gaussian(R, N, seed=2)
    steep = torch.logspace(0, -6, R, dtype=torch.float64)
    match kind:
        case "flat":
            return b, a
        case "steep":
            return b * steep, a
        case "hidden":  # steep, mixed by a random change of gauge
            mix = gaussian(R, R, seed=3)
            return b * steep @ mix, torch.linalg.solve(mix, a)
        case "deficient":
            return b @ gaussian(R, 4, seed=4) @ gaussian(4, R, seed=5), a
        case "cond1e12":
            q = torch.linalg.qr(b).Q
            return q * torch.logspace(0, -12, R, dtype=torch.float64) @ torch.linalg.qr(gaussian(R, R, seed=6)).Q, a
        case "both1e6":
            s = torch.logspace(0, -6, R, dtype=torch.float64)
            return torch.linalg.qr(b).Q * s, s[:, None] * torch.linalg.qr(a.mT).Q.mT
        case "wide":  # rank above the output width
            return gaussian(8, R, seed=7), a
        case "zero":
            return torch.zeros(M, R, dtype=torch.float64), a
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["flat", "steep", "hidden", "deficient", "cond1e12", "both1e6", "wide"])
@pytest.mark.parametrize("k", [1, 3, 8, 15])
def test_excess_over_the_optimum_is_at_rounding(kind: str, k: int) -> None:
    b, a = factors(kind)
    dense = b @ a
    k = min(k, b.shape[0])
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = float((dense - (u[:, :k] * s[:k]) @ vh[:k]).norm() / dense.norm())
    made = truncate(b, a, k)
    left, right = made.b, made.a
    mine = float((dense - left @ right).norm() / dense.norm())
    assert left.shape == (b.shape[0], k)
    assert right.shape == (k, N)
    assert mine - best <= 1e-10 * max(best, 1e-4)


@pytest.mark.parametrize("kind", ["flat", "steep", "hidden", "cond1e12", "wide"])
def test_spectrum_equals_the_dense_one(kind: str) -> None:
    b, a = factors(kind)
    dense = torch.linalg.svdvals(b @ a)
    mine = spectrum(b, a)[: len(dense)]
    torch.testing.assert_close(mine, dense[: len(mine)], rtol=1e-7, atol=1e-14 * float(dense[0]))


def test_factors_are_balanced_and_orthogonal() -> None:
    made = truncate(*factors("hidden"), 5)
    left, right = made.b, made.a
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=1e-8, atol=1e-12)


def test_a_batch_of_experts_is_each_expert() -> None:
    b, a = gaussian(3, M, R, seed=8), gaussian(3, R, N, seed=9)
    made = truncate(b, a, 4)
    for e in range(3):
        one = truncate(b[e], a[e], 4)
        torch.testing.assert_close(made.b[e] @ made.a[e], one.b @ one.a)


def test_zero_stays_zero() -> None:
    made = truncate(*factors("zero"), 2)
    assert float((made.b @ made.a).abs().max()) == 0.0
    assert made.error == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_factors_are_refused(bad: float) -> None:
    b, a = factors("flat")
    b[3, 2] = bad
    with pytest.raises(FormatError, match="not finite"):
        core_svd(b, a)


@pytest.mark.parametrize("kind", ["hidden", "deficient", "cond1e12"])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_error_is_that_of_what_is_stored(kind: str, k: int) -> None:
    b, a = factors(kind)
    made = truncate(b, a, k, dtype=torch.float16)
    assert made.b.dtype == made.a.dtype == torch.float16
    dense = b @ a
    true = float((dense - made.b.double() @ made.a.double()).norm() / dense.norm())
    assert made.error == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("kind", ["flat", "deficient"])
def test_error_keeps_its_digits_at_rounding_level(kind: str) -> None:
    b, a = factors(kind)
    made = truncate(b, a, R, dtype=torch.float32)
    dense = b @ a
    true = float((dense - made.b.double() @ made.a.double()).norm() / dense.norm())
    assert 1e-9 < true < 1e-6
    assert made.error == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("scale", [2.5, -0.5])
@pytest.mark.parametrize("kind", ["flat", "deficient"])
def test_core_and_scale_are_part_of_the_delta(kind: str, scale: float) -> None:
    b, a = factors(kind)
    middle = gaussian(R, R, seed=11)
    dense = scale * b @ middle @ a
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    made = truncate(b, a, 3, middle=middle, scale=scale)
    torch.testing.assert_close(made.b @ made.a, (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-8, atol=1e-8)
    assert made.error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-8)


def test_randomised_core_is_seeded_and_close() -> None:
    b, a = factors("hidden")
    one, two = (truncate(b, a, 4, core=core_rsvd(b, a, None, 1.0, 4, 10, 2, seed=5)) for _ in range(2))
    assert torch.equal(one.b, two.b)
    dense = b @ a
    best = float(torch.linalg.svdvals(dense)[4:].norm())
    assert float((dense - one.b @ one.a).norm()) <= 1.02 * best
