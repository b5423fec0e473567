from __future__ import annotations

import pytest
import torch

from adaptc.errors import FormatError, UsageError
from adaptc.kernels.resident import pack_planes, unpack
from adaptc.quant.baseline import sign_mean, truncation_nf4
from adaptc.quant.bitplane import bit_planes, unpack_planes


def made(seed: int = 0, m: int = 192, n: int = 160, r: int = 8, decay: float = 0.8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=g) * torch.arange(1, r + 1.0) ** -decay, torch.randn(r, n, generator=g)


def error(b: torch.Tensor, a: torch.Tensor, scale: float, planes) -> float:
    dense = scale * b.double() @ a.double()
    pb, pa = planes.factors()
    return float((dense - pb.double() @ pa.double()).norm() / dense.norm())


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
def test_everything_stored_fits_the_budget(bits: float) -> None:
    b, a = made()
    planes = bit_planes(b, a, 2.0, bits)
    assert planes.nbytes <= bits * (b.numel() + a.numel()) / 8 + 1
    for codes, width in zip(torch.cat([planes.p_codes, planes.q_codes.T]).T, planes.bits, strict=True):
        assert (codes % 2 != 0).all()
        assert int(codes.abs().max()) < 1 << width
    assert planes.planes().numel() <= planes.nbytes


def test_planes_come_back_from_their_bytes() -> None:
    planes = bit_planes(*made(), 1.0, 2.3)
    p, q = unpack_planes(planes.planes(), planes.bits, 192, 160)
    assert torch.equal(p, planes.p_codes)
    assert torch.equal(q, planes.q_codes)
    with pytest.raises(FormatError, match="bytes for"):
        unpack_planes(planes.planes()[:-1], planes.bits, 192, 160)


def test_more_bits_are_better_and_one_bit_beats_what_is_usually_called_one_bit() -> None:
    b, a = made(1)
    errors = [error(b, a, 1.0, bit_planes(b, a, 1.0, bits)) for bits in (0.5, 1.0, 2.0, 3.0, 4.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.65 * sign_mean({"m": (b, a, 1.0)}).error
    assert errors[3] < truncation_nf4({"m": (b, a, 1.0)}, int(3 * (b.numel() + a.numel()) / 8)).error


def test_descent_over_codes_lowers_the_error() -> None:
    b, a = made(2)
    assert error(b, a, 1.0, bit_planes(b, a, 1.0, 1.0)) < error(b, a, 1.0, bit_planes(b, a, 1.0, 1.0, sweeps=0))


def test_kernels_read_the_planes_as_they_are() -> None:
    b, a = made(3)
    planes = bit_planes(b, a, 0.5, 1.5)
    resident = pack_planes(planes.p_codes, planes.q_codes, planes.core, planes.bits, planes.bits)
    p, core, q = unpack(resident)
    pb, pa = planes.factors()
    torch.testing.assert_close(p @ core @ q, pb @ pa, rtol=1e-4, atol=1e-4)


def test_a_budget_below_one_direction_is_refused() -> None:
    with pytest.raises(UsageError, match="too few for one direction"):
        bit_planes(*made(), 1.0, 0.05)
