from __future__ import annotations

import pytest
import torch

from adaptc.errors import UnsupportedError
from adaptc.kernels.resident import pack_plain, pack_planes, pack_words, unpack, unpack_words


@pytest.mark.parametrize("bits", [[1], [1, 2, 3, 4], [4] * 20, [1] * 64, [3, 1, 1, 1, 2] * 5])
def test_planes_stand_for_the_product_of_the_codes(bits: list[int]) -> None:
    m, n, r = 33, 50, len(bits)
    p = torch.stack([2 * torch.randint(0, 1 << b, (m,)) - (1 << b) + 1 for b in bits], 1)
    q = torch.stack([2 * torch.randint(0, 1 << b, (n,)) - (1 << b) + 1 for b in bits], 0)
    core, sp, sq = torch.randn(r, r), torch.rand(r), torch.rand(r)
    a = pack_planes(p, q, core, bits, bits, sp, sq)
    left, mid, right = (t.double() for t in unpack(a))
    want = (p.double() * sp.double()) @ core.double() @ (sq.double()[:, None] * q.double())
    torch.testing.assert_close(left @ mid @ right, want, rtol=0, atol=float(want.abs().max()) * 1e-6)
    assert a.shape == (m, n)
    assert a.rank == r
    assert a.packed


def test_different_widths_on_the_two_sides() -> None:
    p, q = torch.tensor([[1, -3], [-1, 1]]), torch.tensor([[7, -5, 1]])
    a = pack_planes(p, q, torch.tensor([[2.0], [1.0]]), [1, 2], [3])
    left, mid, right = unpack(a)
    assert torch.equal(left @ mid @ right, p.float() @ torch.tensor([[2.0], [1.0]]) @ q.float())


def test_plain_factors_keep_their_core() -> None:
    p, q, core = torch.randn(9, 3), torch.randn(5, 11), torch.randn(3, 5)
    left, mid, right = unpack(pack_plain(p, q, core, torch.float32))
    torch.testing.assert_close(left @ mid @ right, p @ core @ q)


@pytest.mark.parametrize("t", [1, 15, 16, 17, 48])
def test_words_round_trip(t: int) -> None:
    signs = 2.0 * torch.randint(0, 2, (t, 37)) - 1
    words = pack_words(signs)
    assert words.dtype == torch.int16
    assert torch.equal(unpack_words(words)[:t], signs)


def test_a_stored_sign_costs_one_bit() -> None:
    a = pack_planes(torch.ones(4096, 16), torch.ones(16, 4096), None, [1] * 16, [1] * 16)
    assert a.q.nbytes + a.p.nbytes == 16 * (4096 + 4096) // 8


@pytest.mark.parametrize(
    ("code", "bits", "words"),
    [(2, 2, "is not an odd 2-bit code"), (5, 2, "is not an odd 2-bit code"), (1, 257, "257 sign planes")],
)
def test_what_no_plane_holds_is_refused(code: int, bits: int, words: str) -> None:
    ones = torch.ones(1, 4)
    with pytest.raises(UnsupportedError, match=words):
        pack_planes(torch.full((3, 1), code), ones, None, [bits], [1])


def test_rank_beyond_the_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rank 257"):
        pack_plain(torch.ones(3, 257), torch.ones(257, 3))
