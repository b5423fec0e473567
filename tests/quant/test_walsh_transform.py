"""Transforms of every width: orthonormal, invertible, flat, and in the order the world uses."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from adaptc.errors import FormatError
from adaptc.quant import paley as fields
from adaptc.quant.paley import character, paley
from adaptc.quant.walsh import Transform, name_for, transform

# Hidden and feed-forward widths of common models up to 30,000, with what carries them.
WIDTHS = {
    384: "paley1:12", 576: "paley2:36", 768: "paley1:12", 896: "paley1:28", 960: "paley1:60", 1024: "sylvester",
    1152: "paley2:36", 1280: "paley1:20", 1536: "paley1:12", 1600: "paley2:100", 1920: "paley1:60",
    2048: "sylvester", 2304: "paley2:36", 2560: "paley1:20", 2688: "paley1:84", 2816: "paley1:44",
    3072: "paley1:12", 3200: "paley2:100", 3584: "paley1:28", 4096: "sylvester", 4304: "block:16",
    4544: "paley1:284", 4608: "paley2:36", 4864: "paley2:76", 5120: "paley1:20", 5376: "paley1:84",
    5504: "paley1:344", 5632: "paley1:44", 6144: "paley1:12", 6400: "paley2:100", 6656: "paley2:52",
    6912: "paley1:108", 7168: "paley1:28", 8192: "sylvester", 8640: "paley2:540", 8960: "paley1:140",
    9216: "paley2:36", 9728: "paley2:76", 10240: "paley1:20", 10752: "paley1:84", 11008: "paley1:344",
    11264: "paley1:44", 12288: "paley1:12", 13696: "block:128", 13824: "paley1:108", 14336: "paley1:28",
    14784: "paley2:924", 15360: "paley1:60", 16384: "sylvester", 17408: "paley1:68", 17920: "paley1:140",
    18432: "paley2:36", 18944: "paley2:148", 19968: "paley1:312", 20480: "paley1:20", 21504: "paley1:84",
    22016: "paley1:344", 24576: "paley1:12", 25600: "paley2:100", 27392: "block:256", 27648: "paley1:108",
    28672: "paley1:28", 29568: "paley2:924",
}


@pytest.mark.parametrize("n", WIDTHS)
def test_common_widths_have_an_orthonormal_transform(n: int) -> None:
    """On probes: U and U^T invert each other, keep inner products, and single entries spread to magnitude n^-1/2."""
    assert name_for(n) == WIDTHS[n]
    t = transform(name_for(n), n)
    assert t.width == n
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    there, back = t.forward(x), t.inverse(x)
    torch.testing.assert_close(t.inverse(there), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(t.forward(back), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(there @ there.T, x @ x.T, rtol=1e-12, atol=1e-10)
    block = n // t.groups
    at = torch.tensor([0, n // 3, n - 1])
    one = torch.zeros(3, n, dtype=torch.float64).index_put_((torch.arange(3), at), torch.ones(3, dtype=torch.float64))
    for spread in (t.forward(one), t.inverse(one)):
        entries = spread.abs() * block**0.5
        assert bool(((entries - 1).abs() < 1e-11).logical_or(entries < 1e-11).all())
        assert (entries > 0.5).sum(1).tolist() == [block] * 3


SMALL = [1, 2, 6, 7, 12, 18, 20, 24, 28, 36, 48, 52, 60, 72, 76, 84, 100, 108, 140, 148, 312, 344, 256, 924]


@pytest.mark.parametrize("n", SMALL)
def test_the_fast_transform_is_the_matrix(n: int) -> None:
    t = transform(name_for(n), n)
    u = t.matrix()
    torch.testing.assert_close(u @ u.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(t.forward(x), x @ u.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(t.inverse(x), x @ u, rtol=0, atol=1e-12)
    c = torch.randn(n, n, dtype=torch.float64)
    c = c @ c.T
    torch.testing.assert_close(t.both_sides(c), u @ c @ u.T, rtol=0, atol=1e-10 * n)
    assert t.forward(x.float()).dtype == torch.float32
    torch.testing.assert_close(t.forward(x.bfloat16()).double(), x @ u.T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("n", [2, 8, 64, 128, 1024])
def test_powers_of_two_are_sylvesters_in_natural_order(n: int) -> None:
    expected = torch.tensor(hadamard(n)).double() / n**0.5
    torch.testing.assert_close(transform("sylvester", n).matrix(), expected, rtol=0, atol=1e-14)


def test_a_transform_that_is_not_symmetric_tells_its_two_directions_apart() -> None:
    t = transform("paley1:12", 24)
    u = t.matrix()
    assert float((u - u.T).abs().max()) > 0.1
    x = torch.randn(4, 24, dtype=torch.float64)
    assert float((t.forward(x) - t.inverse(x)).abs().max()) > 0.1


@pytest.mark.parametrize("order", [12, 28, 36, 84, 344, 100, 924])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_by_fourier_transform_equal_the_matrix(order: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    had = paley(order)
    assert had is not None
    h, x = had.matrix(), torch.randn(2, order, 3, dtype=torch.float64)
    assert set(h.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    monkeypatch.setattr(fields, "DENSE", 0)
    torch.testing.assert_close(had.times(x, transposed), (h.T if transposed else h) @ x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("q", [3, 7, 9, 25, 27, 49, 125, 343])
def test_the_character_is_multiplicative_in_number_and_balanced(q: int) -> None:
    chi = character(q)
    assert int(chi[0]) == 0
    assert int((chi == 1).sum()) == int((chi == -1).sum()) == (q - 1) // 2
    assert int(chi[1]) == 1  # one is a square


def test_the_field_of_nine_elements_by_hand() -> None:
    """x^2 + 1 is irreducible over GF(3): the squares of a + b i are (a^2 - b^2) + 2 a b i."""
    squares = {((a * a - b * b) % 3) + 3 * (2 * a * b % 3) for a in range(3) for b in range(3)} - {0}
    assert {i for i, c in enumerate(character(9).tolist()) if c == 1} == squares


@pytest.mark.parametrize(("name", "n"), [
    ("sylvester", 24), ("sylvester:8", 8), ("paley1:12", 36), ("paley2:12", 12), ("paley1:36", 36), ("paley1:x", 12),
    ("block:3", 12), ("block:8", 12), ("block:0", 12), ("dct", 8), ("", 8), ("paley1:" + "9" * 40, 12),
])
def test_a_name_without_that_width_is_refused(name: str, n: int) -> None:
    with pytest.raises(FormatError, match=f"does not exist at width {n}"):
        transform(name, n)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(FormatError, match="has width 8, its input 16"):
        transform("sylvester", 8).forward(torch.zeros(2, 16))


@pytest.mark.parametrize("n", range(1, 400))
def test_every_width_has_some_transform(n: int) -> None:
    t = transform(name_for(n), n)
    assert isinstance(t, Transform)
    x = torch.randn(1, n, dtype=torch.float64)
    torch.testing.assert_close(t.inverse(t.forward(x)), x, rtol=0, atol=1e-12)
