"""Orthonormal Walsh-Hadamard transforms of any width, applied in O(n log n) without forming them.

U = I_g (x) (H (x) S_L) / sqrt(K L) for width n = g K L: S_L is Sylvester's matrix in natural order, L a power of two,
H a Paley matrix of order K (K = 1: none), g > 1 only in the block fallback. A name and a width identify U exactly:

    sylvester   n = L                 paley1:K, paley2:K   n = K L                 block:b   n = g b, S_b on every block

The basis vectors are the rows of U, so dw = F U, x0 = dw U^T, and the spectrum of an input is U x.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.quant.paley import Paley, paley

_RADIX = 64  # digits of the power-of-two part that one small matrix product transforms


@dataclass(frozen=True, slots=True)
class Transform:
    """One orthonormal U (n, n): `groups` blocks, each of `paley` (None: order 1) times Sylvester's of `length`."""

    name: str
    groups: int
    paley: Paley | None
    length: int

    @property
    def order(self) -> int:
        """K, 1 where no Paley matrix takes part."""
        return 1 if self.paley is None else self.paley.order

    @property
    def width(self) -> int:
        """n = groups * order * length."""
        return self.groups * self.order * self.length

    def forward(self, x: Tensor) -> Tensor:
        """Return x U^T, the spectrum U x of every row of x (..., n), in the dtype of x."""
        return self._apply(x, False)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x U, the rows whose spectrum is x (..., n)."""
        return self._apply(x, True)

    def both_sides(self, c: Tensor) -> Tensor:
        """Return U c U^T for symmetric c (n, n)."""
        return self.forward(self.forward(c).mT.contiguous())

    def matrix(self) -> Tensor:
        """Return U (n, n), float64: for tests and small widths."""
        return self.inverse(torch.eye(self.width, dtype=torch.float64))

    def _apply(self, x: Tensor, transposed: bool) -> Tensor:
        if x.shape[-1] != self.width:
            raise FormatError(f"transform {self.name} has width {self.width}, its input {x.shape[-1]}")
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        out = sylvester(wide.reshape(-1, self.length), (self.order * self.length) ** -0.5)
        if self.paley is not None:
            out = self.paley.times(out.reshape(-1, self.order, self.length), transposed)
        return out.reshape(x.shape).to(x.dtype)


def sylvester(x: Tensor, scale: float) -> Tensor:
    """Return scale * S_L x of every row of x (rows, L), L a power of two: products with matrices of at most 64 rows."""
    rows, length = x.shape
    left, out = length, x
    first = True
    while first or left > 1:
        radix = min(left, _RADIX)
        left //= radix
        h = _small(radix).to(x)
        if first:
            out = out.reshape(-1, radix) @ (h * scale)
        else:
            out = h @ out.reshape(-1, radix, length // (left * radix))
        first = False
    return out.reshape(rows, length)


def name_for(n: int) -> str:
    """Return the name of the transform that spreads widest at width n.

    Sylvester for powers of two, else the smallest Paley order K with n = K 2^a, else blocks of the largest power of
    two that divides n. Block transforms of 1 leave an odd width as it is.
    """
    if n < 1:
        raise FormatError(f"width is {n}, must be positive")
    two = n & -n
    if two == n:
        return "sylvester"
    order = 4 * n // two
    while n % order == 0:
        found = paley(order)
        if found is not None:
            return f"paley{found.kind}:{order}"
        order *= 2
    return f"block:{two}"


@cache
def transform(name: str, n: int) -> Transform:
    """Return the transform of that name at width n. Raises FormatError for a name that has no such width."""
    kind, colon, number = name.partition(":")
    if kind == "sylvester" and not colon and n > 0 and n & (n - 1) == 0:
        return Transform(name, 1, None, n)
    if re.fullmatch(r"[1-9][0-9]{0,8}", number):
        size = int(number)
        if kind == "block" and size & (size - 1) == 0 and n % size == 0:
            return Transform(name, n // size, None, size)
        found = paley(size) if kind in ("paley1", "paley2") and n % size == 0 else None
        length = n // size if found is not None else 0
        if found is not None and f"paley{found.kind}" == kind and length > 0 and length & (length - 1) == 0:
            return Transform(name, 1, found, length)
    raise FormatError(f"transform {name[:60]!r} does not exist at width {n}")


@cache
def _small(radix: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(int(math.log2(radix))):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
