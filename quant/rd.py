"""Global rate-distortion coding: one byte budget over all modules and singular directions of an adapter.

Delta k of a module is dW = sum_j gain_j p_j q_j^T with integer vectors p (m,), q (n,): the singular vectors, scaled by
their singular values and trellis-quantized with one common step (`allocate`), entropy-coded (`tans`), and fitted again:
u against the decoded v, then all gains of a module in closed form. Directions lie in the payload in the order of error
removed a bit, so every prefix is a smaller adapter. The byte format is specified in docs/rd-coding.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptc.errors import FormatError, UsageError
from adaptc.quant import allocate
from adaptc.quant.allocate import Doubles, Spectra
from adaptc.quant.rd_fit import Coded, Fit, Module, Svd, fit_directions, split_gains, svd_of
from adaptc.quant.rd_index import Index, decode_index, encode_index, payload_order, pieces
from adaptc.quant.rd_tables import Ints
from adaptc.quant.tans import Lanes, decode_lanes, encode_lanes

__all__ = ["Budget", "Module", "RDCode", "cut", "decode", "encode", "scale_gains"]

Floats = npt.NDArray[np.float32]
Column = npt.NDArray[Any]


@dataclass(frozen=True)
class Budget:
    """What to spend: exactly one of bits a source parameter, bytes of index and payload, or total relative error."""

    bits_per_param: float | None = None
    nbytes: int | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.bits_per_param, self.nbytes, self.max_error) if v is not None]
        if len(given) != 1 or not given[0] > 0:
            raise UsageError(f"a budget takes exactly one positive limit, got {self}")


@dataclass(frozen=True)
class RDCode:
    """An encoded adapter: module names with shapes (m, n), the index, and the payload, most important first."""

    shapes: Mapping[str, tuple[int, int]]
    index: bytes
    payload: bytes | memoryview

    @property
    def nbytes(self) -> int:
        """Bytes of index and payload; names and shapes are the container's."""
        return len(self.index) + len(self.payload)


def encode(modules: Mapping[str, Module], budget: Budget, weights: Mapping[str, float] | None = None) -> RDCode:
    """Encode `modules` within `budget`; deterministic.

    `weights` scale a module's delta in the distortion, sum_k weight_k^2 |dW_k - dW'_k|^2 (default 1: plain error); a
    `max_error` is relative, in the same weighted norm, and is met as measured. The size never exceeds a byte budget;
    where not one direction fits, the code is empty (the zero delta).

    Raises:
        FormatError: a factor holds non-finite values.
    """
    names = list(modules)
    svds = [svd_of(modules[name]) for name in names]
    weight = np.array([1.0 if weights is None else weights[name] for name in names])
    ranks = [len(svd.s) for svd in svds]
    spectra = Spectra(
        np.concatenate([w * svd.s for w, svd in zip(weight, svds, strict=True)]) if svds else np.zeros(0),
        np.repeat([len(svd.u) for svd in svds], ranks),
        np.repeat([len(svd.v) for svd in svds], ranks),
    )
    shapes = {name: (len(svd.u), len(svd.v)) for name, svd in zip(names, svds, strict=True)}
    if not spectra.sigma.any():
        nothing = Coded([], [], np.zeros(0, np.int64), 0.0)
        return _pack(shapes, Fit(Index([0] * len(names), [], [], [], [], [], 8), nothing, nothing, 0.0))
    if budget.max_error is not None:
        return _encode_error(shapes, svds, weight, spectra, budget.max_error)
    params = sum(module.b.size + module.a.size for module in modules.values())
    limit = budget.nbytes or int((budget.bits_per_param or 0.0) * params / 8)
    return _encode_nbytes(shapes, svds, weight, spectra, limit)


def _encode_nbytes(
    shapes: dict[str, tuple[int, int]], svds: list[Svd], weight: Doubles, spectra: Spectra, limit: int
) -> RDCode:
    target, best, lowest, code = float(limit), None, np.inf, None
    for attempt in range(9):
        fit = fit_directions(svds, weight, allocate.for_bits(spectra, 8 * target))
        nbytes = fit.nbytes
        if attempt >= 4 or 0.985 * limit <= nbytes <= 1.004 * limit:  # worth the exact size
            code = _pack(shapes, fit)
            nbytes = code.nbytes
            if nbytes <= limit and fit.error < lowest:
                best, lowest = code, fit.error
            if 0.985 * limit <= nbytes <= limit:
                break
        target *= 0.9985 * limit / nbytes
    assert code is not None
    return best or cut(code, limit)


def _encode_error(
    shapes: dict[str, tuple[int, int]], svds: list[Svd], weight: Doubles, spectra: Spectra, limit: float
) -> RDCode:
    target = limit
    for _ in range(8):
        allocation = allocate.for_error(spectra, target)
        fit = fit_directions(svds, weight, allocation)
        if fit.error <= 0.9995 * limit:  # the gains are yet to be rounded
            break
        target *= 0.998 * limit / fit.error
    if fit.error > 0.9995 * limit:
        raise UsageError(f"an error of {limit:g} is below what this coding reaches, {fit.error:.2g}")
    return _pack(shapes, fit)


def _pack(shapes: dict[str, tuple[int, int]], fit: Fit) -> RDCode:
    """Entropy-code the levels of a fit."""
    index, sizes = fit.index, list(shapes.values())
    owner = np.repeat(np.arange(len(sizes)), index.counts)
    groups: dict[int, list[tuple[int, str, int, int]]] = {}  # by length: direction, side, first sample, split
    for d, j in enumerate(owner):
        m, n = sizes[j]
        for side, first, stop in pieces(m, n):
            groups.setdefault(stop - first, []).append((d, side, first, n if side == "vu" else stop - first))
    streams: dict[tuple[int, str, int], bytes] = {}
    for length, members in groups.items():
        row, raw = (
            _columns(members, v, u, length)
            for v, u in ((fit.v.row, fit.u.row), (fit.v.raw, fit.u.raw))
        )
        lanes = Lanes(
            np.full(len(members), length),
            np.array([split for *_, split in members]),
            np.array([index.u[d] if side == "u" else index.v[d] for d, side, *_ in members]),
            np.array([index.v[d] if side == "v" else index.u[d] for d, side, *_ in members]),
        )
        for (d, side, first, _), stream in zip(members, encode_lanes(row, raw, lanes), strict=True):
            streams[d, side, first] = stream
    parts = [[streams[d, side, first] for side, first, _ in pieces(*sizes[j])] for d, j in enumerate(owner)]
    index = replace(index, lengths=[[len(stream) for stream in part] for part in parts])
    payload = b"".join(stream for d in payload_order(index) for stream in parts[d])
    return RDCode(shapes, encode_index(index, sizes), payload)


def _columns(members: list[tuple[int, str, int, int]], v: list[Column], u: list[Column], length: int) -> Column:
    """Stack the samples of streams as columns (length, streams)."""
    out = []
    for d, side, first, _ in members:
        column = np.concatenate([v[d], u[d]]) if side == "vu" else v[d] if side == "v" else u[d]
        out.append(column[first : first + length])
    return np.stack(out, axis=1)


def decode(code: RDCode) -> dict[str, tuple[Floats, Floats]]:
    """Decode to float32 factors b (m, k), a (k, n) with dW' = b @ a; a payload cut short gives fewer directions.

    b holds mantissa * 2^(e - h) * p and a holds 2^h * q, h = floor((e + precision) / 2), both exact products.

    Raises:
        FormatError: the index contradicts the shapes or the payload, or a stream does not end where it should.
    """
    sizes = list(code.shapes.values())
    index = decode_index(code.index, sizes)
    order = payload_order(index)
    width = np.array([sum(lengths) for lengths in index.lengths], np.int64)
    origin = np.empty(len(width), np.int64)
    origin[order] = np.cumsum(width[order]) - width[order]
    if width.sum() < len(code.payload):
        raise FormatError(f"payload has {len(code.payload)} bytes, its index accounts for {width.sum()}")
    complete = np.zeros(len(width), np.bool_)
    complete[order[: int((np.cumsum(width[order]) <= len(code.payload)).sum())]] = True
    rows = _decode_rows(bytes(code.payload), index, np.flatnonzero(complete), origin, sizes)
    ends = np.cumsum(index.counts).tolist()
    out = {}
    for (name, (m, n)), count, end in zip(code.shapes.items(), index.counts, ends, strict=True):
        mine = [d for d in range(end - count, end) if complete[d]]
        part = np.stack([rows[d] for d in mine]) if len(mine) else np.empty((0, m + n), np.int8)
        mantissa = np.array([index.mantissa[d] for d in mine], np.float32)
        exponent = np.array([index.exponent[d] for d in mine], np.int64)
        half = (exponent + index.precision) // 2
        low, high = np.ldexp(mantissa, exponent - half), np.ldexp(np.float32(1), half)
        p = np.multiply(part[:, n:], low[:, None], dtype=np.float32)
        q = np.multiply(part[:, :n], high[:, None].astype(np.float32), dtype=np.float32)
        out[name] = (p.T, q)
    return out


def _decode_rows(
    payload: bytes, index: Index, chosen: Ints, origin: Ints, sizes: Sequence[tuple[int, int]]
) -> dict[int, npt.NDArray[np.integer]]:
    """Decode the `chosen` directions: points of v, then of u, by direction."""
    owner = np.repeat(np.arange(len(sizes)), index.counts)
    lanes: list[tuple[int, int, int, int]] = []  # length, split, first class, second class
    start, nbytes = [], []
    for d in chosen.tolist():
        m, n = sizes[owner[d]]
        u, v, at = index.u[d], index.v[d], int(origin[d])
        for (side, first, stop), length in zip(pieces(m, n), index.lengths[d], strict=True):
            split = n if side == "vu" else stop - first
            lanes.append((stop - first, split, u if side == "u" else v, v if side == "v" else u))
            start.append(at)
            nbytes.append(length)
            at += length
    shape = Lanes(*np.array(lanes, np.int64).reshape(-1, 4).T)
    found = iter(decode_lanes(payload, np.array(start, np.int64), np.array(nbytes, np.int64), shape))
    return {
        d: np.concatenate(rows) if len(rows := [next(found) for _ in index.lengths[d]]) > 1 else rows[0]
        for d in chosen.tolist()
    }


def cut(code: RDCode, nbytes: int) -> RDCode:
    """Cut `code` to at most `nbytes` bytes without decoding: its longest prefix of directions, and their index."""
    sizes = list(code.shapes.values())
    index = decode_index(code.index, sizes)
    order = payload_order(index)
    ends = np.cumsum([sum(index.lengths[d]) for d in order]) if len(order) else np.zeros(0, np.int64)
    owner = np.repeat(np.arange(len(sizes)), index.counts)

    def first(count: int) -> RDCode:
        mine = np.sort(order[:count])
        part = index.take(mine.tolist(), np.bincount(owner[mine], minlength=len(sizes)).tolist())
        return RDCode(code.shapes, encode_index(part, sizes), code.payload[: int(ends[count - 1]) if count else 0])

    low, high = 0, int((ends <= len(code.payload)).sum())
    if code.nbytes <= nbytes and high == len(ends):
        return code
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first(middle).nbytes <= nbytes else (low, middle - 1)
    return first(low)


def scale_gains(code: RDCode, factors: Mapping[str, npt.NDArray[np.floating[Any]]]) -> RDCode:
    """Multiply the gains of each module, in the order of `decode`, by positive `factors`; the payload stays as it is.

    Raises:
        UsageError: a factor is not positive, or a module has another number of directions.
    """
    sizes = list(code.shapes.values())
    index = decode_index(code.index, sizes)
    given = [np.asarray(factors[name], np.float64) for name in code.shapes]
    for name, count, factor in zip(code.shapes, index.counts, given, strict=True):
        if len(factor) != count or not ((factor > 0) & np.isfinite(factor)).all():
            raise UsageError(f"{name}: wants {count} positive factors, got {len(factor)}")
    gain = np.ldexp(np.array(index.mantissa, np.float64), np.array(index.exponent, np.int64))
    mantissa, exponent = split_gains(gain * np.concatenate([*given, np.zeros(0)]), index.precision)
    index = replace(index, mantissa=mantissa.tolist(), exponent=exponent.tolist())
    return RDCode(code.shapes, encode_index(index, sizes), code.payload)
