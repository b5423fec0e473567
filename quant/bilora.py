"""Bi-LoRA's quantizer (Jie, Wang, Deng, ICCV 2023, arXiv 2307.16867): mean, deviation, median codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import UsageError
from adaptc.quant.codec import FactorCodec, expect
from adaptc.quant.nf4 import nearest
from adaptc.quant.pack import pack_codes, unpack_codes

_EPS = 1e-5  # the paper's code adds it to the deviation when it normalises, not when it decodes


@cache
def codebook(bits: int) -> Tensor:
    """Return the 2^bits levels for N(0, 1), float32, ascending: fixed point of conditional medians.

    v_i = Phi^-1((Phi(t_i) + Phi(t_{i+1})) / 2) with t_i the midpoint of v_{i-1} and v_i, 500 iterations: the least
    absolute error, not the least squares (1 bit: +-0.6745, where least squares has +-0.7979).
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    n = 2**bits
    v = normal.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for _ in range(500):
        edges = torch.cat([torch.zeros(1).double(), normal.cdf((v[:-1] + v[1:]) / 2), torch.ones(1).double()])
        v = normal.icdf((edges[:-1] + edges[1:]) / 2)
    return ((v - v.flip(0)) / 2).float()


@dataclass(frozen=True, kw_only=True)
class BiLora(FactorCodec):
    """w ~ codebook[code] * std + mean, with the tensor's own mean and standard deviation; 1, 2, 4 or 8 bits.

    Streams: `codes` (packed little end first), `moments` (float32: mean, std). Made for factors trained with it
    (`quantize_aware`); on others it is worse than sign * mean.
    """

    id: ClassVar[str] = "bilora"
    width: int = 1

    def __post_init__(self) -> None:
        if self.width not in (1, 2, 4, 8):
            raise UsageError(f"Bi-LoRA has 1, 2, 4 or 8 bits, not {self.width}")

    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return codes and moments of w."""
        mean, std = w.mean(), w.std()
        code = nearest((w - mean) / (std + _EPS), codebook(self.width))
        return {"codes": pack_codes(code, self.width), "moments": torch.stack([mean, std])}

    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return codebook[code] * std + mean."""
        code = unpack_codes(streams["codes"], self.width, rows * columns).long()
        mean, std = expect(streams["moments"], 2, "moments").tolist()
        return (codebook(self.width)[code] * std + mean).reshape(rows, columns)
