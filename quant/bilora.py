"""Bi-LoRA's quantizer (Jie, Wang, Deng, ICCV 2023, arXiv 2307.16867): mean, deviation, median codebook."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaptc.errors import UsageError
from adaptc.quant.codec import FactorCodec
from adaptc.quant.nf4 import nearest
from adaptc.quant.pack import pack_codes, packed_nbytes, unpack_codes

_FACTOR = re.compile(r"\.lora_[AB]\.")
_EPS = 1e-5  # the paper's code adds it to the deviation when it normalises, not when it decodes


@cache
def codebook(bits: int) -> Tensor:
    """Return the 2^bits levels for N(0, 1), float32, ascending: fixed point of conditional medians.

    v_i = Phi^-1((Phi(t_i) + Phi(t_{i+1})) / 2) with t_i the midpoint of v_{i-1} and v_i, 500 iterations: the least
    absolute error, not the least squares (1 bit: +-0.6745, where least squares has +-0.7979).
    """
    n = 2**bits
    v = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for _ in range(500):
        edges = torch.cat([torch.zeros(1).double(), torch.special.ndtr((v[:-1] + v[1:]) / 2), torch.ones(1).double()])
        v = torch.special.ndtri((edges[:-1] + edges[1:]) / 2)
    levels: Tensor = ((v - v.flip(0)) / 2).float()
    return levels


@dataclass(frozen=True, kw_only=True)
class BiLora(FactorCodec):
    """w ~ codebook[code] * std + mean, with the tensor's own mean and standard deviation; 1, 2, 4 or 8 bits.

    Streams: `codes` (packed little end first), `moments` (float32: mean, std). Made for factors trained with it
    (`quantize_aware`); on others it is worse than sign * mean.
    """

    id: ClassVar[str] = "bilora"
    width: int = 1

    def __post_init__(self) -> None:
        FactorCodec.__post_init__(self)
        if self.width not in (1, 2, 4, 8):
            raise UsageError(f"Bi-LoRA has 1, 2, 4 or 8 bits, not {self.width}")

    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return codes and moments of w; of values that already are codes, those codes."""
        code, mean, std = self._codes_of(w) or self._round(w)
        return {"codes": pack_codes(code, self.width), "moments": torch.stack([mean, std])}

    def _round(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = w.mean(), w.std()
        return nearest((w - mean) / (std + _EPS), codebook(self.width)), mean, std

    def _codes_of(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (codes, mean, std) where w takes exactly the values of a codebook (trained with it), else None."""
        levels, book = torch.unique(w), codebook(self.width)
        if len(levels) != len(book):
            return None
        std = (levels[-1].double() - levels[0].double()) / (book[-1].double() - book[0].double())
        mean = (levels[-1].double() + levels[0].double()) / 2
        fits = torch.allclose(book.double() * std + mean, levels.double(), rtol=0, atol=1e-6 * float(std))
        return (nearest(w, levels), mean.float(), std.float()) if fits else None

    def sizes(self, rows: int, columns: int) -> Mapping[str, tuple[torch.dtype, int]]:
        """Codes of `width` bits, mean and deviation."""
        return {"codes": (torch.uint8, packed_nbytes(rows * columns, self.width)), "moments": (torch.float32, 2)}

    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return codebook[code] * std + mean."""
        code = unpack_codes(streams["codes"], self.width, rows * columns).long()
        mean, std = streams["moments"]
        decoded: Tensor = codebook(self.width)[code] * std + mean
        return decoded.reshape(rows, columns)


class StraightThrough(nn.Module):
    """w -> its Bi-LoRA value; gradients pass the rounding unchanged, and flow through mean and deviation."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.book = codebook(bits)

    def forward(self, w: Tensor) -> Tensor:
        """Return codebook[nearest(w')] * std + mean with w' = (w - mean) / (std + 1e-5), in the dtype of w."""
        mean, std = w.mean(), w.std()
        normal = (w - mean) / (std + _EPS)
        book = self.book.to(w.device)
        code = book[nearest(normal.detach().float(), book).long()].to(w.dtype)
        return (normal + (code - normal).detach()) * std + mean


def quantize_aware(model: nn.Module, bits: int = 1) -> int:
    """Make every LoRA factor of a PEFT model train as its own `bits`-bit code; return how many factors that are.

    Parametrizes each lora_A and lora_B weight in place (the one thing here that changes its argument, as training
    does). Factors that are all zero, as B is at the start, get Kaiming noise first: zero has no deviation to normalise
    by. Call `bake` before saving. Raises UsageError for a width the paper has not, or a model without LoRA factors.
    """
    BiLora(width=bits)
    factors = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and _FACTOR.search(name)]
    if not factors:
        raise UsageError("the model has no lora_A or lora_B layers to quantize")
    for layer in factors:
        if not bool(layer.weight.any()):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
            with torch.no_grad():
                layer.weight *= 0.01
        parametrize.register_parametrization(layer, "weight", StraightThrough(bits))
    return len(factors)


def bake(model: nn.Module) -> nn.Module:
    """Replace the training parametrization by the values it produces, so that the model saves as plain PEFT."""
    for layer in model.modules():
        held: Any = getattr(layer, "parametrizations", {})
        if "weight" in held and any(isinstance(p, StraightThrough) for p in held["weight"]):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model
