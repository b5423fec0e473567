"""Factor codecs: inverse pairs, laws every codec keeps, and the values other implementations have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptc.errors import FormatError, UsageError
from adaptc.factor import Encoded
from adaptc.quant.affine import Affine
from adaptc.quant.bilora import BiLora, codebook
from adaptc.quant.codec import FactorCodec
from adaptc.quant.fp8 import FP8
from adaptc.quant.nf4 import LEVELS, NF4, dynamic_map
from adaptc.quant.pack import pack_codes, unpack_codes
from adaptc.registry import CODECS

CASES: list[tuple[type[FactorCodec], dict[str, Any], float]] = [
    (Affine, {"width": 2}, 0.47), (Affine, {"width": 3}, 0.20), (Affine, {"width": 4}, 0.095),
    (Affine, {"width": 8, "group": 32}, 0.006), (NF4, {}, 0.095), (FP8, {}, 0.03), (BiLora, {"width": 1}, 0.63),
    (BiLora, {"width": 2}, 0.37), (BiLora, {"width": 4}, 0.12), (BiLora, {"width": 8}, 0.02)]
IDS = [f"{c.id}-{'-'.join(map(str, k.values()))}" for c, k, _ in CASES]


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 65, 1000])
def test_packing_has_an_inverse_and_no_slack(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == -(-n * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, n), codes)
    with pytest.raises(FormatError, match="bytes for"):
        unpack_codes(torch.cat([packed, torch.zeros(1, dtype=torch.uint8)]), bits, n)


@pytest.mark.parametrize(("codec", "config", "bound"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", [(8, 768), (768, 8), (3, 100), (65, 2), (1, 1)])
def test_error_is_that_of_the_scheme_and_shape_comes_back(codec: type[FactorCodec], config: dict[str, Any],
                                                          bound: float, shape: tuple[int, int]) -> None:
    w = t(*shape)
    if codec is BiLora and w.numel() < 2:
        return  # one value has no deviation
    code = codec.encode(w, **config)
    back = code.decode()
    assert back.shape == w.shape
    assert back.dtype == w.dtype
    assert code.config["transpose"] == (shape[0] > shape[1])
    if w.numel() > 1000:
        assert float((back - w).norm() / w.norm()) < bound
        again = codec.encode(back, **config).decode()
        if codec is not BiLora:  # its moments are those of the data, so decoding and coding again moves them
            torch.testing.assert_close(again, back, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("codec", "config", "bound"), CASES, ids=IDS)
def test_orientation_does_not_change_the_error(codec: type[FactorCodec], config: dict[str, Any], bound: float) -> None:
    w = t(8, 768)
    torch.testing.assert_close(codec.encode(w, **config).decode(), codec.encode(w.T.contiguous(), **config).decode().T)


@pytest.mark.parametrize(("codec", "config", "bound"), CASES, ids=IDS)
def test_bits_count_every_stream(codec: type[FactorCodec], config: dict[str, Any], bound: float) -> None:
    code = codec.encode(t(16, 1024), **config)
    assert CODECS.get(codec.id) is codec
    assert 8 * code.nbytes / (16 * 1024) == pytest.approx(codec(**config).bits((16, 1024)))


@pytest.mark.parametrize(("codec", "config", "bound"), CASES, ids=IDS)
def test_streams_that_do_not_fit_are_refused(codec: type[FactorCodec], config: dict[str, Any], bound: float) -> None:
    code = codec.encode(t(8, 96), **config)
    for name in code.streams:
        short = {**code.streams, name: code.streams[name][:-1]}
        with pytest.raises(FormatError):
            Encoded(code.codec, code.config, short, code.shape, code.dtype).decode()
        gone = {k: v for k, v in code.streams.items() if k != name}
        with pytest.raises(FormatError):
            Encoded(code.codec, code.config, gone, code.shape, code.dtype).decode()


@pytest.mark.parametrize("codec", [Affine, NF4, FP8])
def test_not_finite_is_refused(codec: type[FactorCodec]) -> None:
    w = t(8, 96)
    w[0, 0] = float("inf")
    with pytest.raises(FormatError):
        codec.encode(w)


def test_more_bits_are_never_worse() -> None:
    w = t(8, 768)
    for codec, widths in ((Affine, (2, 3, 4, 8)), (BiLora, (1, 2, 4, 8))):
        errors = [float((codec.encode(w, width=b).decode() - w).norm()) for b in widths]
        assert errors == sorted(errors, reverse=True)
    with pytest.raises(UsageError):
        Affine(width=5)
    with pytest.raises(UsageError):
        BiLora(width=3)


def test_medians_are_the_published_ones() -> None:
    torch.testing.assert_close(codebook(1), torch.tensor([-0.67448975, 0.67448975]), rtol=0, atol=1e-6)
    torch.testing.assert_close(codebook(2).abs(), torch.tensor([1.266, 0.378, 0.378, 1.266]), rtol=0, atol=2e-3)


def test_nf4_tables() -> None:
    assert len(LEVELS) == 16
    assert tuple(sorted(LEVELS)) == LEVELS
    table = dynamic_map()
    assert table.numel() == 256
    assert bool((table[1:] > table[:-1]).all())


@pytest.mark.parametrize("n", [64, 4096, 64 * 300])
def test_nf4_equals_bitsandbytes(n: int) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = t(1, n)
    code, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    theirs = bnb.dequantize_4bit(code, state)
    mine = NF4.encode(w)
    torch.testing.assert_close(mine.decode(), theirs.float(), rtol=0, atol=1e-6)
    streams = {"codes": code.reshape(-1), "absmax": state.absmax, "scale": state.state2.absmax,
               "offset": state.offset.reshape(1)}
    read = Encoded("nf4", {"transpose": False}, streams, w.shape, torch.float32).decode()
    torch.testing.assert_close(read, theirs.float(), rtol=0, atol=1e-6)
