"""Tensor types: bytes as gguf decodes them, values on a grid kept, and never worse than rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from files import noise

from adaptc.formats.gguf_pair import code_pair
from adaptc.formats.gguf_types import TYPES

BLOCKS = [n for n, t in TYPES.items() if t.quantized]


def plain(name: str, b: torch.Tensor, a: torch.Tensor, rank: int) -> torch.Tensor:
    """dW of factors rounded one by one as they are, the rank padded with zeros."""
    kinds = [TYPES[n] for n in name.split()]
    padded = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
    left = kinds[1].decode(kinds[1].encode(padded)).double()[:, : b.shape[1]]
    return left @ kinds[0].decode(kinds[0].encode(a)).double()


def coded(name: str, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, int]:
    pair = code_pair(b, a, *name.split())
    return pair.type_b.decode(pair.b).double() @ pair.type_a.decode(pair.a).double(), pair.rank


@pytest.mark.parametrize("name", [n for n in TYPES if n != "q1_0"])
def test_gguf_decodes_the_same_values(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    raw = TYPES[name].encode(noise(6, 512))
    theirs = gguf.quants.dequantize(raw.numpy(), getattr(gguf.GGMLQuantizationType, name.upper()))
    assert np.array_equal(theirs, TYPES[name].decode(raw).float().numpy())


def test_one_bit_is_a_sign_and_the_mean() -> None:
    """By hand: fp16 mean |x|, then bit j % 8 of byte j / 8, 1 for +."""
    x = noise(3, 256)
    raw = TYPES["q1_0"].encode(x).numpy().reshape(6, 18)
    for block, row in zip(x.reshape(6, 128).numpy(), raw, strict=True):
        d = row[:2].copy().view(np.float16)[0]
        assert d == np.float16(np.abs(block).mean(dtype=np.float32))
        bits = [int(row[2 + j // 8]) >> (j % 8) & 1 for j in range(128)]
        assert bits == [int(v >= 0) for v in block]
    want = np.sign(x.numpy().reshape(6, 128)) * raw[:, :2].copy().view(np.float16).astype(np.float32)
    assert np.array_equal(TYPES["q1_0"].decode(torch.from_numpy(raw.reshape(3, 36))).numpy(), want.reshape(3, 256))


@pytest.mark.parametrize("name", TYPES)
def test_values_on_the_grid_are_kept(name: str) -> None:
    once = TYPES[name].decode(TYPES[name].encode(noise(8, 512) ** 3))
    assert torch.equal(TYPES[name].decode(TYPES[name].encode(once.float())), once)
    assert not TYPES[name].decode(TYPES[name].encode(torch.zeros(2, 512))).any()


@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "q1_0"])
def test_least_squares_beats_rounding_to_nearest(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    x, q = noise(16, 512), getattr(gguf.GGMLQuantizationType, name.upper())
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), q), q))
    assert (TYPES[name].decode(TYPES[name].encode(x)) - x).norm() <= (theirs - x).norm()
    assert torch.equal(TYPES[name].decode(TYPES[name].encode(theirs)), theirs)  # ggml's own codes survive


@pytest.mark.parametrize("types", ["q8_0 q8_0", "q4_0 q4_0", "q1_0 q4_0", "tq2_0 q4_0", "q1_0 f16", "q1_0 q1_0"])
@pytest.mark.parametrize("rank", [8, 32])
def test_gauge_refit_and_padding_beat_rounding_the_factors(types: str, rank: int) -> None:
    s = 0.8 ** torch.arange(rank).double()
    b, a = noise(96, rank).double() * s, noise(rank, 512, seed=1).double()
    made, wide = coded(types, b, a)
    error = (made - b @ a).norm() / (b @ a).norm()
    naive = (plain(types, b, a, wide) - b @ a).norm() / (b @ a).norm()
    assert error <= naive
    if types == "q1_0 q4_0" and rank == 8:  # three more planes of signs lie in the padding
        assert wide == 32
        assert error < 0.25 < naive


def test_padding_is_zero_where_nothing_is_left() -> None:
    b, a = noise(64, 4).double(), torch.ones(4, 256).double()
    a[1:] = 0
    made, rank = coded("q1_0 q4_0", b, a)
    assert rank == 32
    assert float((made - b @ a).norm() / (b @ a).norm()) < 0.1


def test_large_factors_are_balanced_into_half_precision() -> None:
    b, a = noise(16, 4).double() * 1e6, noise(4, 32, seed=1).double() * 1e-4
    made, _ = coded("f16 f16", b, a)
    assert (made - b @ a).norm() / (b @ a).norm() < 1e-3
