"""Golomb-Rice codes of positions: as short as random masks allow, decoded block by block, nothing hostile accepted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.factor import Encoded
from adaptc.quant.golomb import Golomb

SIDE = 4096


def mask(size: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(size) < density))


def entropy(size: int, count: int) -> float:
    """Return log2 of the number of masks with `count` of `size` positions, a position."""
    log = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return log / math.log(2) / count


@pytest.mark.parametrize("density", [0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05])
def test_random_masks_cost_their_entropy_and_a_twentieth_of_a_bit(density: float) -> None:
    size = SIDE * SIDE // 4  # 2^22: every block is as full as in a larger one
    at = mask(size, density)
    code = Golomb.encode(at, size, SIDE)
    assert torch.equal(code.decode(), at)
    bits = 8 * sum(s.nbytes for s in code.streams.values()) / len(at)
    assert entropy(size, len(at)) <= bits <= entropy(size, len(at)) + 0.05


def test_the_largest_entries_of_a_low_rank_delta_cost_no_more_than_random_ones() -> None:
    random = torch.Generator().manual_seed(0)
    b, a = torch.randn(1024, 16, generator=random), torch.randn(16, 1024, generator=random)
    b[::7] *= 3  # rows that training moved more
    at = (b @ a).abs().flatten().topk(1 << 14).indices.sort().values
    code = Golomb.encode(at, 1 << 20, 1024)
    assert torch.equal(code.decode(), at)
    assert 8 * code.nbytes / len(at) <= entropy(1 << 20, len(at)) + 0.05


@pytest.mark.parametrize(("at", "size", "row"), [
    ([], 5, 1), ([], 1, 1), ([0], 1, 1), ([4], 5, 5), (range(7), 7, 1), (range(7), 7, 3), ([0, 2**33], 2**34, 2**12),
    ([5, 6, 7, 1000], 1001, 7)])
def test_nothing_one_all_and_far_apart(at: list[int], size: int, row: int) -> None:
    wanted = torch.tensor(list(at), dtype=torch.int64)
    assert torch.equal(Golomb.encode(wanted, size, row).decode(), wanted)


@pytest.mark.parametrize("density", [1e-5, 0.001, 0.2, 0.6, 1.0])
def test_every_density_comes_back(density: float) -> None:
    at = mask(1 << 18, density, seed=1)
    assert torch.equal(Golomb.encode(at, 1 << 18, 512).decode(), at)


def test_blocks_decode_by_themselves() -> None:
    at = mask(1 << 20, 0.03)
    code = Golomb.encode(at, 1 << 20, 1024)
    codec = Golomb(**code.config)
    assert codec.span % 1024 == 0
    assert codec.blocks == 4
    for i in range(codec.blocks):
        before, some = codec.block(code.streams, i)
        assert torch.equal(some, at[before : before + len(some)])
        assert torch.equal(some, at[(at >= i * codec.span) & (at < (i + 1) * codec.span)])


@pytest.mark.parametrize("at", [[3, 3], [4, 2], [-1, 2], [1, 10]])
def test_positions_must_rise_within(at: list[int]) -> None:
    with pytest.raises(FormatError, match="do not rise from 0 to below 10"):
        Golomb.encode(torch.tensor(at), 10)


@pytest.mark.parametrize("config", [{"size": 0, "span": 1}, {"size": 5, "span": 0}, {"size": 5, "span": 2**31},
                                    {"size": True, "span": 1}, {"size": 5.0, "span": 1}])
def test_options_are_whole_numbers(config: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Golomb(**config)  # type: ignore[arg-type]


def sound() -> Encoded:
    return Golomb.encode(mask(1 << 16, 0.4), 1 << 16, 256)


def hostile(**streams: torch.Tensor) -> Encoded:
    code = sound()
    return replace(code, streams={**code.streams, **streams})


def table(column: int, value: int) -> torch.Tensor:
    made = sound().streams["table"].clone()
    made[column] = value
    return made


@pytest.mark.parametrize(("code", "says"), [
    (hostile(bits=sound().streams["bits"][:-1]), "expected"),
    (hostile(table=sound().streams["table"][:-3]), "expected 12"),
    (hostile(table=table(0, -1)), "claims more positions"),
    (hostile(table=table(0, 2**30)), "claims more positions"),
    (hostile(table=table(1, 0)), "modulus"),
    (hostile(table=table(1, 2**31 - 1)), "modulus"),
    (hostile(table=table(2, -5)), "claims more positions"),
    (hostile(table=sound().streams["table"].long()), "int64"),
    (hostile(bits=sound().streams["bits"].view(torch.int8)), "int8"),
    (hostile(more=torch.zeros(1)), "streams are"),
    (hostile(bits=torch.zeros_like(sound().streams["bits"])), "ends after"),
    (hostile(bits=torch.full_like(sound().streams["bits"], 255)), "left over"),
    (replace(sound(), shape=torch.Size([3])), "expected 3"),
    (replace(sound(), config={"size": 100, "span": 50}), "expected 6"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_hostile_streams_are_refused(code: Encoded, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        code.decode()


def test_positions_beyond_the_end_are_refused() -> None:
    """A block whose gaps are sound bits and run out of its span."""
    at = torch.tensor([1, 62])
    code = Golomb.encode(at, 100, 100)
    with pytest.raises(FormatError, match="of its 60 places"):
        replace(code, config={"size": 60, "span": 60}).decode()


def test_random_bytes_are_refused_or_rise() -> None:
    rng, code = np.random.default_rng(3), sound()
    size, refused = int(code.config["size"]), 0
    for _ in range(300):
        bits = code.streams["bits"].clone()
        bits[rng.integers(len(bits))] ^= int(rng.integers(1, 256))
        try:
            at = replace(code, streams={**code.streams, "bits": bits}).decode()
        except AdaptcError:
            refused += 1
            continue
        assert len(at) == code.shape[0]
        assert bool((at[1:] > at[:-1]).all())
        assert int(at[0]) >= 0
        assert int(at[-1]) < size
    assert refused > 0
