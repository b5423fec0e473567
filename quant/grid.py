"""Quantizers of base weights, decoded: the values a weight takes once it is stored in few bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.quant.nf4 import BLOCK, LEVELS, nearest


class Grid(Protocol):
    """Values that the entries of one group of a row may take: `fit` chooses them, `snap` rounds to the nearest."""

    @property
    def name(self) -> str:
        """The quantizer as it is written, such as int3:group=64."""

    @property
    def group(self) -> int:
        """Entries of a row that share parameters."""

    @property
    def bits(self) -> float:
        """Stored bits an entry, with the parameters of its group."""

    def fit(self, w: Tensor) -> Tensor:
        """Return the parameters (rows, k, 1) of groups w (rows, group), float32."""

    def snap(self, w: Tensor, fitted: Tensor) -> Tensor:
        """Return w (rows, columns) rounded to the grid of each row, float32."""


@dataclass(frozen=True, slots=True)
class Integer:
    """low + step * code, code in 0 .. 2^width - 1, low and step in float16: what the codec `affine` decodes to."""

    width: int
    group: int = 64

    def __post_init__(self) -> None:
        if self.width not in (2, 3, 4, 8) or not 8 <= self.group <= 2**16:
            raise UsageError(f"integer grids have 2, 3, 4 or 8 bits in groups of 8 to 65536, not {self.width}, "
                             f"{self.group}")

    @property
    def name(self) -> str:
        """int3:group=64."""
        return f"int{self.width}:group={self.group}"

    @property
    def bits(self) -> float:
        """Stored bits an entry, with the parameters of its group."""
        return self.width + 32 / self.group

    def fit(self, w: Tensor) -> Tensor:
        """Return low and step (rows, 2, 1) from the range of every row."""
        low = w.amin(1).half().float()
        step = ((w.amax(1) - low).clamp(min=0) / (2**self.width - 1)).half().float()
        if not bool(torch.isfinite(low).all() and torch.isfinite(step).all()):
            raise FormatError("weights do not fit the fp16 range of a group")
        return torch.stack([low, step], 1)[:, :, None]

    def snap(self, w: Tensor, fitted: Tensor) -> Tensor:
        """Return low + step * the nearest code."""
        low, step = fitted[:, 0], fitted[:, 1]
        code = ((w - low) / step.clamp(min=1e-30)).round_().clamp_(0, 2**self.width - 1)
        return code.mul_(step).add_(low)


@dataclass(frozen=True, slots=True)
class Normal:
    """LEVELS[code] * absmax in blocks of 64, absmax in float32: NF4 of bitsandbytes, without double quantising."""

    group: int = BLOCK

    def __post_init__(self) -> None:
        if self.group != BLOCK:
            raise UsageError(f"nf4 has blocks of {BLOCK}, not {self.group}")

    @property
    def name(self) -> str:
        """nf4."""
        return "nf4"

    @property
    def bits(self) -> float:
        """Stored bits an entry, with the scale of its block."""
        return 4 + 32 / BLOCK

    def fit(self, w: Tensor) -> Tensor:
        """Return absmax (rows, 1, 1)."""
        absmax = w.abs().amax(1)
        if not bool(torch.isfinite(absmax).all()):
            raise FormatError("weights are not finite")
        return absmax[:, None, None]

    def snap(self, w: Tensor, fitted: Tensor) -> Tensor:
        """Return the nearest level times absmax."""
        absmax = fitted[:, 0]
        return _levels()[nearest(w / absmax.clamp(min=1e-30), _levels()).long()] * absmax


def round_to_nearest(w: Tensor, grid: Grid) -> Tensor:
    """Return w (m, n) with every entry at its nearest value, float32; the last group of a row may be shorter.

    Blocks of nf4 run over the flattened weight, as bitsandbytes cuts them.
    """
    w = w.float()
    if isinstance(grid, Normal):
        blocks = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % BLOCK)).reshape(-1, BLOCK)
        return grid.snap(blocks, grid.fit(blocks)).reshape(-1)[: w.numel()].reshape(w.shape)
    m, n = w.shape
    whole = n // grid.group * grid.group
    parts = []
    for part in (w[:, :whole].reshape(-1, grid.group), w[:, whole:]):
        if part.numel():
            parts.append(grid.snap(part, grid.fit(part)).reshape(m, -1))
    return torch.cat(parts, 1)


def grid_of(name: str, group: int) -> Grid:
    """Return the grid called nf4, int2, int3, int4 or int8, with `group` entries a scale. Raises UsageError."""
    if name == "nf4":
        return Normal()
    found = re.fullmatch(r"int([0-9]+)", name)
    if found is None or int(found[1]) not in (2, 3, 4, 8):
        raise UsageError(f"quantizer {name} is not known (known: nf4, int2, int3, int4, int8)",
                         hint="or give the folder of a quantised model")
    return Integer(int(found[1]), group)


@cache
def _levels() -> Tensor:
    return torch.tensor(LEVELS)
