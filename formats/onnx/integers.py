"""Matrices as few integers: rows that are a float times small whole numbers, and digits packed into bytes.

Rate-distortion codes (adaptc.quant.rd) and sign codes decode to such rows. An entropy coder has no place in an ONNX
graph, so the exporter finds the integers again, exactly, and packs them at a fixed number of levels, or in Rice codes,
whose ends a graph finds all at once: they are the ones of a bit string.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptc.formats.onnx.model import Array

LARGEST = 2**15  # of an integer; a row with larger ones is no cheaper than float16
_GROUP_NBYTES = 200  # what another way of coding costs in nodes
_LOWEST = 12  # Rice codes have fewer low bits


@dataclass(frozen=True)
class Radix:
    """Digits below `base`: `digits` of them in a word of `nbytes` bytes, the first in the lowest place."""

    base: int
    nbytes: int
    digits: int

    @property
    def powers(self) -> Array:
        """Weight of each digit, int32."""
        return self.base ** np.arange(self.digits, dtype=np.int64)

    def size(self, n: int) -> int:
        """Return the bytes of n digits."""
        return -(-n // self.digits) * self.nbytes

    def pack(self, digits: Array) -> Array:
        """Return digits (n,) as bytes: words with the low byte first, the last word filled up with zeros."""
        padded = np.pad(digits.astype(np.int64), (0, -len(digits) % self.digits)).reshape(-1, self.digits)
        words = (padded * self.powers).sum(1)
        packed: Array = (words[:, None] >> 8 * np.arange(self.nbytes) & 255).astype(np.uint8).reshape(-1)
        return packed


def radix(base: int) -> Radix:
    """Return the densest packing of digits below `base` (2 to 2^24) into words of at most three bytes."""
    made = []
    for nbytes in (1, 2, 3):
        digits = 0
        while base ** (digits + 1) <= 256**nbytes:
            digits += 1
        if digits:
            made.append(Radix(base, nbytes, digits))
    return max(made, key=lambda r: r.digits / r.nbytes)


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix: value = scale[row] * (start + step * number), numbers (rows, n) int64.

    Numbers lie in 0 .. base - 1, to be packed as digits; or `base` is 0, they have signs, and are Rice codes of `low`
    bits: |number| in zigzag, its `low` lowest bits as a digit, the rest in unary (so many zeros, then a one).
    """

    where: Array  # (rows,) their places in the matrix
    numbers: Array
    scale: Array  # (rows,) float32
    start: int
    step: int
    base: int
    low: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        if self.base:
            return radix(self.base).size(self.numbers.size)
        unary, low = self.rice()
        return len(unary) + (radix(2**self.low).size(low.size) if self.low else 0)

    def rice(self) -> tuple[Array, Array]:
        """Return the unary parts as packed bits, the first in the lowest, and the low bits as digits (rows, n)."""
        zigzag = _zigzag(self.numbers)
        ones = np.cumsum((zigzag >> self.low).reshape(-1) + 1) - 1
        bits = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
        bits[ones] = 1
        return np.packbits(bits, bitorder="little"), zigzag & ((1 << self.low) - 1)


def integer_rows(w: Array) -> list[Rows] | None:
    """Return w (rows, n) float32 as integers with one scale a row, rows that are coded alike together.

    scale * integer is exact in float32 for every entry. None where a row is no float times integers below LARGEST.
    """
    whole = _whole(w)
    if whole is None:
        return None
    q, scale = whole
    top = np.abs(q).max(1, initial=0)
    odd = (q % 2 != 0).all(1) & (top > 0)
    out = []
    for step in (1, 2):
        mine = np.flatnonzero(odd == (step == 2))
        numbers = (q[mine] - (step - 1)) // step
        for base, low, part in _coded(numbers, np.where(step == 2, top[mine] + 1, 2 * top[mine] + 1).clip(2)):
            start = (step - 1) - step * (base // 2) if base else step - 1
            kept = numbers[part] + base // 2 if base else numbers[part]
            out.append(Rows(mine[part], kept, scale[mine[part]], start, step, base, low))
    return out


def _zigzag(numbers: Array) -> Array:
    """Return 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return np.where(numbers >= 0, 2 * numbers, -2 * numbers - 1)


def _coded(numbers: Array, bases: Array) -> list[tuple[int, int, Array]]:
    """Return (base, low bits, rows) of groups: a few ways of coding, chosen greedily to take the fewest bytes."""
    if not len(numbers):
        return []
    n, zigzag = numbers.shape[1], _zigzag(numbers)
    ways = [(int(b), 0) for b in np.unique(bases)] + [(0, low) for low in range(_LOWEST)]
    cost = np.stack([np.where(bases <= b, radix(b).size(n), np.inf) if b else
                     ((zigzag >> low).sum(1) + n * (1 + low)) / 8 for b, low in ways])
    chosen = [int((cost.sum(1)).argmin())]
    while True:
        now = cost[chosen].min(0)
        gains = [float((now - np.minimum(now, c)).sum()) - _GROUP_NBYTES for c in cost]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
    owner = cost[chosen].argmin(0)
    groups = [(ways[c], np.flatnonzero(owner == i)) for i, c in enumerate(chosen)]
    return [(base, low, part) for (base, low), part in groups if len(part)]


def _whole(w: Array) -> tuple[Array, Array] | None:
    """Return int64 q and float32 scale (rows,) with q * scale == w exactly and no common divisor in a row."""
    mantissa, exponent = np.frexp(w.astype(np.float64))
    ints = (mantissa * 2.0**24).astype(np.int64)  # exact: float32 has 24 bits
    if not np.array_equal(np.ldexp(ints.astype(np.float64), exponent - 24), w):
        return None
    zeros = ints == 0
    low = np.where(zeros, 1, ints & -ints)  # lowest set bit
    place = exponent - 24 + np.log2(low.astype(np.float64)).astype(np.int64)
    unit = np.where(zeros, np.iinfo(np.int64).max, place).min(1, initial=2000)
    unit = np.where(zeros.all(1), 0, unit)
    wide = np.ldexp(w.astype(np.float64), -unit[:, None])
    if np.abs(wide).max(initial=0) > 2**40:
        return None
    q = wide.astype(np.int64)
    divisor = np.gcd.reduce(q, axis=1)
    divisor = np.where(divisor == 0, 1, divisor)
    q = q // divisor[:, None]
    if np.abs(q).max(initial=0) > LARGEST:
        return None
    scale = np.ldexp(divisor.astype(np.float64), unit).astype(np.float32)
    exact = scale[:, None] * q.astype(np.float32)
    return (q, scale) if np.array_equal(exact, w) else None
