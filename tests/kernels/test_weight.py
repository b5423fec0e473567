from __future__ import annotations

import pytest
import torch

from adaptc.errors import UnsupportedError
from adaptc.kernels.weight import NF4, nf4_from_bitsandbytes, pack_weight, plain_weight, unpack_weight


@pytest.mark.parametrize("n", [64, 100, 4])
def test_every_entry_becomes_the_nearest_value_of_its_block(n: int) -> None:
    w = torch.randn(7, n)
    back = unpack_weight(pack_weight(w, "nf4"))
    for start in range(0, n, 64):
        block, got = w[:, start : start + 64], back[:, start : start + 64]
        levels = torch.tensor(NF4) * block.abs().amax(1, keepdim=True).unsqueeze(-1)
        best = (levels - block.unsqueeze(-1)).abs().amin(-1)
        torch.testing.assert_close((got - block).abs(), best, rtol=1e-5, atol=1e-6)


def test_int4_is_within_half_a_step() -> None:
    w = torch.randn(5, 128)
    step = w.view(5, 2, 64).abs().amax(-1) / 7
    error = (unpack_weight(pack_weight(w, "int4")) - w).view(5, 2, 64).abs().amax(-1)
    assert bool((error <= step * 0.500001).all())


def test_quantising_twice_changes_nothing() -> None:
    once = unpack_weight(pack_weight(torch.randn(6, 192), "nf4"))
    torch.testing.assert_close(unpack_weight(pack_weight(once, "nf4")), once)


def test_a_zero_block_stays_zero() -> None:
    assert bool((unpack_weight(pack_weight(torch.zeros(2, 64), "nf4")) == 0).all())


def test_bitsandbytes_codes_read_as_bitsandbytes_reads_them() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(32, 128)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = nf4_from_bitsandbytes(packed, state.absmax, (32, 128), 64)
    torch.testing.assert_close(unpack_weight(ours), bnb.dequantize_4bit(packed, state).float(), rtol=1e-6, atol=1e-6)


def test_blocks_that_cross_rows_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="32 x 100"):
        nf4_from_bitsandbytes(torch.zeros(1600, dtype=torch.uint8), torch.zeros(50), (32, 100), 64)
    with pytest.raises(UnsupportedError, match="code bytes"):
        nf4_from_bitsandbytes(torch.zeros(7, dtype=torch.uint8), torch.zeros(50), (32, 128), 64)


def test_integer_weights_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="dtype"):
        plain_weight(torch.zeros(2, 2, dtype=torch.int32))
