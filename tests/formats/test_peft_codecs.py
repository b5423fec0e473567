"""Weights rebuilt from coefficients, against their defining sums written out entry by entry."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.factor import Encoded
from adaptc.registry import CODECS

F64 = torch.float64


def numbers(*shape: int) -> Tensor:
    """Fixed values without a generator: a fraction of the golden ratio's multiples."""
    n = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=F64)
    return (n * 0.6180339887498949 % 1 - 0.5).reshape(shape)


STREAMS: dict[str, tuple[dict[str, Tensor], tuple[int, int]]] = {
    "fourier": ({"indices": torch.tensor([1, 7, 11, 14]), "values": numbers(4)}, (5, 3)),
    "haar": ({"indices": torch.tensor([0, 3, 9, 14, 22]), "values": numbers(5)}, (4, 6)),
    "circulant": ({"kernel": numbers(2, 3, 2)}, (4, 6)),
    "randlora": ({"a": numbers(2, 3), "b": numbers(5, 4, 2), "lambda": numbers(2, 4), "gamma": numbers(4, 3)}, (5, 3)),
}


def fourier(s: Mapping[str, Tensor], m: int, n: int) -> Tensor:
    w = torch.zeros(m, n, dtype=F64)
    for x, y, (i, v) in itertools.product(range(m), range(n), zip(s["indices"], s["values"], strict=True)):
        u, k = divmod(int(i), n)
        w[x, y] += (float(v) * cmath.exp(2j * cmath.pi * (u * x / m + k * y / n))).real / (m * n)
    return w


def haar(s: Mapping[str, Tensor], m: int, n: int) -> Tensor:
    def step(side: int) -> Tensor:  # rows: averages, then details; orthonormal
        h = torch.zeros(side, side, dtype=F64)
        for i in range(side // 2):
            h[i, 2 * i : 2 * i + 2] = 0.5**0.5
            h[side // 2 + i, 2 * i], h[side // 2 + i, 2 * i + 1] = 0.5**0.5, -(0.5**0.5)
        return h

    spectrum = torch.zeros(m * n, dtype=F64)
    spectrum[s["indices"]] = s["values"]
    (ca, ch), (cv, cd) = (q.chunk(2, 1) for q in spectrum.reshape(m, n).chunk(2))
    swapped = torch.cat([torch.cat([ca, cv], 1), torch.cat([ch, cd], 1)])  # cH: differences down, stored on the right
    return step(m).T @ swapped @ step(n)


def circulant(s: Mapping[str, Tensor], m: int, n: int) -> Tensor:
    k = s["kernel"]
    b = k.shape[2]
    rows = [[float(k[i // b, j // b, (j % b - i % b) % b]) / n for j in range(n)] for i in range(m)]
    return torch.tensor(rows, dtype=F64)


def randlora(s: Mapping[str, Tensor], m: int, n: int) -> Tensor:
    a, b, lam, gamma = (s[k] for k in ("a", "b", "lambda", "gamma"))
    r, nb = lam.shape
    left = torch.stack([b[:, i, j] for i in range(nb) for j in range(r)])  # basis by basis
    right = torch.stack([lam[j, i] * a[j] * gamma[i] for j in range(r) for i in range(nb)])  # rank by rank
    return left.T @ right


BY_HAND = {"fourier": fourier, "haar": haar, "circulant": circulant, "randlora": randlora}


@pytest.mark.parametrize("codec", BY_HAND)
def test_decodes_to_the_defining_sum(codec: str) -> None:
    streams, shape = STREAMS[codec]
    made = Encoded(codec, {}, streams, torch.Size(shape), F64).decode()
    assert made.shape == shape
    assert torch.allclose(made, BY_HAND[codec](streams, *shape), atol=1e-14)


def test_randlora_turns_with_the_weight() -> None:
    streams, _ = STREAMS["randlora"]
    tall = Encoded("randlora", {}, streams, torch.Size((5, 3)), F64).decode()
    wide = Encoded("randlora", {}, streams, torch.Size((3, 5)), F64).decode()
    assert torch.equal(tall.T, wide)


@pytest.mark.parametrize("codec", BY_HAND)
def test_the_decoded_dtype_is_the_asked_one_and_only_streams_count(codec: str) -> None:
    streams, shape = STREAMS[codec]
    weight = Encoded(codec, {}, streams, torch.Size(shape), torch.bfloat16)
    assert weight.decode().dtype == torch.bfloat16
    assert weight.nbytes == sum(s.nbytes for s in streams.values())
    assert CODECS.get(codec).id == codec


@pytest.mark.parametrize(("codec", "change"), [
    ("fourier", {"indices": torch.tensor([0, 1, 2, 15])}), ("fourier", {"indices": torch.tensor([0, 1, 2, -1])}),
    ("fourier", {"values": numbers(3)}), ("haar", {"indices": None}), ("circulant", {"kernel": numbers(3, 3, 2)}),
    ("circulant", {"kernel": numbers(4, 6)}), ("randlora", {"a": numbers(3, 3)}),
    ("randlora", {"gamma": numbers(4, 2)}),
])
def test_streams_that_do_not_fit_are_refused(codec: str, change: dict[str, Any]) -> None:
    streams, shape = STREAMS[codec]
    held = {k: v for k, v in (streams | change).items() if v is not None}
    with pytest.raises(FormatError, match=rf"^{codec}: |^indices "):
        Encoded(codec, {}, held, torch.Size(shape), F64).decode()
