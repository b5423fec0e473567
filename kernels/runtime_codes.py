"""Turn a low-rank delta into what the kernels hold: sign planes where its factors are small integers, else factors.

A coded factor decodes to scale * c with small integers c in every direction (rate-distortion codes, signs), or to two
values. Both are odd codes and a constant: c = ((2 c + 1) - 1) / 2. The constants of all directions share one plane of
ones, and scales, constants and the delta's own core fold into the core of the planes, so nothing is lost or expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.delta import LowRank
from adaptc.factor import decoded
from adaptc.kernels.device import FLOATS
from adaptc.kernels.resident import MAX_PLANES, WORD, Resident, pack_plain, pack_planes, padded

Ints = npt.NDArray[np.int64]
WIDEST = 8  # bits of a direction worth holding as planes
PROBE = 1024


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector as scale * codes + offset, codes odd with |code| < 2^bits."""

    codes: Ints
    bits: int
    scale: float
    offset: float


def residents(delta: LowRank, dtype: torch.dtype) -> tuple[tuple[Resident, ...], float]:
    """Return (parts, scale) with dW = scale * the sum of the parts, each of at most 256 planes or directions.

    Plain factors are held in the wider of their own dtype and `dtype`, unrounded; ranks above 256 are split.
    """
    a, b = decoded(delta.a), decoded(delta.b)
    if min(a.shape[0], b.shape[1]) == 0:
        return (), delta.scale
    core = None if delta.core is None else decoded(delta.core).double()
    plain = torch.promote_types(torch.promote_types(a.dtype, b.dtype), dtype)
    plain = plain if plain in FLOATS else torch.float32
    made = _planes(a, b, core, plain.itemsize)
    if made is not None:
        return (made,), delta.scale
    if max(a.shape[0], b.shape[1]) <= MAX_PLANES:
        return (pack_plain(b, a, core, plain),), delta.scale
    if core is not None:
        a = (core @ a.double()).to(torch.float32)
    cuts = range(0, a.shape[0], MAX_PLANES)
    return tuple(pack_plain(b[:, k : k + MAX_PLANES], a[k : k + MAX_PLANES], None, plain) for k in cuts), delta.scale


def direction(vector: npt.NDArray[Any]) -> Direction | None:
    """Return a vector as odd codes and a constant, exactly, or None where it takes more than 8 bits."""
    if len(np.unique(vector[:PROBE])) > 1 << WIDEST:
        return None
    values, at = np.unique(vector.astype(np.float64), return_inverse=True)
    if len(values) == 1:
        return Direction(np.ones(len(vector), np.int64), 1, float(values[0]), 0.0)
    if len(values) == 2:
        low, high = values
        return Direction(2 * at.reshape(-1).astype(np.int64) - 1, 1, float(high - low) / 2, float(high + low) / 2)
    whole = _integers(values)
    if whole is None:
        return None
    codes, unit = whole
    if (codes % 2 != 0).all():
        odd, scale, offset = codes, unit, 0.0
    else:
        if codes.max() > -codes.min():  # -4 .. 3 takes three bits, -3 .. 4 four
            codes, unit = -codes, -unit
        odd, scale, offset = 2 * codes + 1, unit / 2, -unit / 2
    bits = int(np.abs(odd).max()).bit_length()
    return Direction(odd[at.reshape(-1)], bits, scale, offset) if bits <= WIDEST else None


def _integers(values: npt.NDArray[np.float64]) -> tuple[Ints, float] | None:
    """Return the smallest integers that values are a common multiple of, and the multiplier; float32 values only."""
    mantissa, exponent = np.frexp(values)
    whole = np.ldexp(mantissa, 24)
    used = values != 0
    low = int(exponent[used].min())
    if not (whole == np.rint(whole)).all() or int(exponent[used].max()) - low > 32:
        return None
    integers = np.where(used, whole.astype(np.int64) << np.where(used, exponent - low, 0).astype(np.int64), 0)
    common = int(np.gcd.reduce(integers))
    return integers // common, float(np.ldexp(float(common), low - 24))


def _planes(a: Tensor, b: Tensor, core: Tensor | None, itemsize: int) -> Resident | None:
    """Return the delta as sign planes, or None where they do not exist or are larger than plain factors."""
    q_side = _side(a)
    p_side = None if q_side is None else _side(b.t())
    if q_side is None or p_side is None:
        return None
    (q_codes, q_bits, q_map), (p_codes, p_bits, p_map) = q_side, p_side
    if max(sum(q_bits), sum(p_bits)) > MAX_PLANES:
        return None
    n, m = a.shape[1], b.shape[0]
    words = padded(sum(q_bits)) // WORD * n + padded(sum(p_bits)) // WORD * m
    if 2 * words > itemsize * (padded(a.shape[0]) * n + padded(b.shape[1]) * m):
        return None
    inner = p_map @ q_map.t() if core is None else p_map @ core @ q_map.t()
    return pack_planes(p_codes.t(), q_codes, inner, p_bits, q_bits)


def _side(rows: Tensor) -> tuple[Tensor, list[int], Tensor] | None:
    """Return (codes, bits, map) with rows = map^T codes: a direction a row, and one of ones if any has a constant."""
    found = []
    for row in rows.detach().float().cpu().numpy() if rows.dtype != torch.float64 else rows.detach().cpu().numpy():
        made = direction(row)
        if made is None:
            return None
        found.append(made)
    codes = [torch.from_numpy(d.codes) for d in found]
    bits = [d.bits for d in found]
    weights = torch.diag(torch.tensor([d.scale for d in found], dtype=torch.float64))
    offsets = torch.tensor([[d.offset for d in found]], dtype=torch.float64)
    if bool(offsets.any()):
        codes.append(torch.ones(rows.shape[1], dtype=torch.int64))
        bits.append(1)
        weights = torch.cat([weights, offsets])
    return torch.stack(codes), bits, weights
