"""Matrices as few integers: rows that are a float times small whole numbers, and digits packed into bytes.

Rate-distortion codes (adaptc.quant.rd) and sign codes decode to such rows. An entropy coder has no place in an ONNX
graph, so the exporter finds the integers again, exactly, and packs them at a fixed number of levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptc.formats.onnx.model import Array

LARGEST = 2**15  # of an integer; a row with larger ones is no cheaper than float16
_GROUP_NBYTES = 150  # what another node in the graph costs


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
    """Some rows of a matrix: value = scale[row] * level, levels lowest, lowest + step, ... by `digits` (rows, n)."""

    where: Array  # (rows,) their numbers in the matrix
    digits: Array  # (rows, n) int64
    scale: Array  # (rows,) float32
    lowest: int
    step: int
    base: int


def integer_rows(w: Array) -> list[Rows] | None:
    """Return w (rows, n) float32 as integers with one scale a row, rows of similar range together.

    scale * level is exact in float32 for every entry. None where a row is no float times integers below LARGEST.
    """
    whole = _whole(w)
    if whole is None:
        return None
    q, scale = whole
    top = np.abs(q).max(1, initial=0)
    odd = (q % 2 != 0).all(1) & (top > 0)
    base = np.where(odd, top + 1, 2 * top + 1).clip(2)
    groups = []
    for parity in (False, True):
        mine = np.flatnonzero(odd == parity)
        groups += [(parity, mine[part]) for part in _grouped(base[mine], w.shape[1])]
    out = []
    for parity, where in groups:
        high = int(top[where].max())
        step = 2 if parity else 1
        levels = int(base[where].max())
        lowest = -high if parity else -(levels // 2)
        out.append(Rows(where, (q[where] - lowest) // step, scale[where], lowest, step, levels))
    return out


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


def _grouped(base: Array, n: int) -> list[Array]:
    """Return row numbers in groups that pack at one base, chosen to take the fewest bytes (dynamic programming)."""
    order = np.argsort(base, kind="stable")
    sizes = [radix(int(base[i])).size(n) for i in order]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        cost = [(best[start][0] + sizes[end - 1] * (end - start) + _GROUP_NBYTES, start) for start in range(end)]
        best.append(min(cost))
    out, end = [], len(order)
    while end:
        start = best[end][1]
        out.append(np.sort(order[start:end]))
        end = start
    return out
