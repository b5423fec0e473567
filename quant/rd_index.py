"""The index of a rate-distortion code: its directions, their classes, gains and stream lengths, in Rice codes.

A Rice code of v >= 0 with parameter k is (v >> k) zero bits, a one, and the k low bits of v; signed values go in as
zigzag (0, -1, 1, -2, ... -> 0, 1, 2, 3, ...). Bits fill bytes from the most significant end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptc.errors import AdaptcError
from adaptc.quant.allocate import CLASS_LIMIT
from adaptc.quant.rd_tables import Ints, rate

LANE = 4096  # most samples a stream holds
_RATE: list[int] = rate(np.arange(CLASS_LIMIT + 1)).tolist()
FIELDS = ("count", "v", "u", "exponent", "length")  # one Rice parameter each, in this order


@dataclass(frozen=True)
class Index:
    """Directions in module order: `counts` a module; class, gain mantissa and exponent a direction; bytes a stream."""

    counts: list[int]
    v: list[int]
    u: list[int]
    mantissa: list[int]
    exponent: list[int]  # gain = mantissa * 2^exponent
    lengths: list[list[int]]
    precision: int  # mantissas lie in 2^precision .. 2^(precision + 1) - 1

    def take(self, directions: Sequence[int], counts: list[int]) -> Index:
        """Return the index of some `directions`, in module order, of which `counts` fall to each module."""
        return Index(
            counts,
            [self.v[d] for d in directions],
            [self.u[d] for d in directions],
            [self.mantissa[d] for d in directions],
            [self.exponent[d] for d in directions],
            [self.lengths[d] for d in directions],
            self.precision,
        )


def cuts(size: int) -> list[tuple[int, int]]:
    """Cut a vector into the fewest nearly equal pieces of at most `LANE` samples; the trellis starts anew in each."""
    parts = -(-size // LANE)
    return [(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def pieces(m: int, n: int) -> list[tuple[str, int, int]]:
    """List the streams of a direction: one with v then u where they fit in `LANE`, else each side in equal pieces."""
    if m + n <= LANE:
        return [("vu", 0, m + n)]
    return [(side, *piece) for side, size in (("v", n), ("u", m)) for piece in cuts(size)]


def expected_nbytes(m: int, n: int, u: int, v: int) -> list[int]:
    """Predict the bytes of each stream of a direction from its classes."""
    cost = {"v": _RATE[v], "u": _RATE[u]}
    return [
        (n * cost["v"] + m * cost["u"] if side == "vu" else (stop - start) * cost[side]) // 2048 + 1
        for side, start, stop in pieces(m, n)
    ]


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(value: int) -> int:
    return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)


def _symbols(index: Index, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """List (field, value) in stream order; field -1 is a mantissa."""
    out: list[tuple[int, int]] = []
    v = u_over_v = exponent = direction = 0
    for (m, n), count in zip(shapes, index.counts, strict=True):
        out.append((0, count))
        start = None
        for d in range(direction, direction + count):
            out.append((1, _zigzag(v - index.v[d])))
            out.append((2, _zigzag(index.u[d] - index.v[d] - u_over_v)))
            out.append((3, _zigzag(index.exponent[d] - exponent)))
            out.append((-1, index.mantissa[d] - (1 << index.precision)))
            v, u_over_v, exponent = index.v[d], index.u[d] - index.v[d], index.exponent[d]
            expected = expected_nbytes(m, n, index.u[d], v)
            out += [(4, _zigzag(got - want)) for got, want in zip(index.lengths[d], expected, strict=True)]
            start = start or (v, exponent)
        if start:
            v, exponent = start  # the next module is likelier to begin where this one began
        direction += count
    return out


def encode_index(index: Index, shapes: Sequence[tuple[int, int]]) -> bytes:
    """Write `index` for modules of `shapes` (m, n)."""
    symbols = _symbols(index, shapes)
    parameters = []
    for field in range(len(FIELDS)):
        values = np.array([value for f, value in symbols if f == field], np.int64)
        parameters.append(min(range(16), key=lambda k: int((values >> k).sum()) + k * len(values)))
    bits = "".join(f"{value:04b}" for value in [index.precision, *parameters])
    chunks = [bits]
    for field, value in symbols:
        k = parameters[field] if field >= 0 else index.precision
        low = f"{value & ((1 << k) - 1):0{k}b}" if k else ""
        chunks.append(low if field < 0 else "0" * (value >> k) + "1" + low)
    bits = "".join(chunks)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def decode_index(data: bytes, shapes: Sequence[tuple[int, int]]) -> Index:
    """Read an index written for modules of `shapes` (m, n).

    Raises:
        AdaptcError: the bits end early, a value is out of range, or bytes are left over.
    """
    bits = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""
    if len(bits) < 4 * (1 + len(FIELDS)):
        raise AdaptcError(f"index has {len(data)} bytes, too few for its own header")
    precision, *parameters = (int(bits[i : i + 4], 2) for i in range(0, 4 * (1 + len(FIELDS)), 4))
    at = 4 * (1 + len(FIELDS))

    def fixed(width: int) -> int:
        nonlocal at
        if at + width > len(bits):
            raise AdaptcError(f"index ends after {len(data)} bytes, in the middle of a direction")
        at += width
        return int(bits[at - width : at], 2) if width else 0

    def rice(field: int) -> int:
        nonlocal at
        one = bits.find("1", at)
        if one < 0:
            raise AdaptcError(f"index ends after {len(data)} bytes, in the middle of a direction")
        high, at = one - at, one + 1
        return high << parameters[field] | fixed(parameters[field])

    out = Index([], [], [], [], [], [], precision)
    v = u_over_v = exponent = 0
    for m, n in shapes:
        count = rice(0)
        if count > min(m, n):
            raise AdaptcError(f"module {len(out.counts)} of shape {m} x {n} claims {count} directions")
        out.counts.append(count)
        start = None
        for _ in range(count):
            v -= _unzigzag(rice(1))
            u_over_v += _unzigzag(rice(2))
            exponent += _unzigzag(rice(3))
            mantissa = (1 << precision) + fixed(precision)
            if not (0 <= v <= CLASS_LIMIT and 0 <= v + u_over_v <= CLASS_LIMIT and abs(exponent) < 200):
                raise AdaptcError(f"module {len(out.counts) - 1} has classes {v}, {v + u_over_v}, exponent {exponent}")
            if (m + n) // LANE > len(bits) - at:
                raise AdaptcError(f"index ends after {len(data)} bytes, in the middle of a direction")
            lengths = [want + _unzigzag(rice(4)) for want in expected_nbytes(m, n, v + u_over_v, v)]
            if min(lengths) < 0:
                raise AdaptcError(f"module {len(out.counts) - 1} has a stream of {min(lengths)} bytes")
            out.v.append(v)
            out.u.append(v + u_over_v)
            out.mantissa.append(mantissa)
            out.exponent.append(exponent)
            out.lengths.append(lengths)
            start = start or (v, exponent)
        if start:
            v, exponent = start
    if "1" in bits[at:] or len(bits) - at >= 8:
        raise AdaptcError(f"index has {len(bits) - at} bits left over")
    return out


def payload_order(index: Index) -> Ints:
    """Return directions in payload order: falling u + v class, that is error removed a bit; ties as indexed."""
    key = np.array(index.u, np.int64) + np.array(index.v, np.int64)
    return np.argsort(-key, kind="stable")
