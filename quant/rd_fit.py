"""Fit integer vectors and gains to singular directions: the lossy half of rate-distortion coding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adaptc.errors import FormatError
from adaptc.quant import allocate
from adaptc.quant.allocate import Allocation, Doubles
from adaptc.quant.rd_index import Index, cuts
from adaptc.quant.rd_tables import BITS, FINE, Ints, rate
from adaptc.quant.tans import symbols
from adaptc.quant.trellis import Levels, search, walk


class Module(NamedTuple):
    """A low-rank delta dW = scale * b @ a."""

    b: npt.NDArray[np.floating]  # (m, r)
    a: npt.NDArray[np.floating]  # (r, n)
    scale: float = 1.0


class Svd(NamedTuple):
    """The thin singular value decomposition of a module."""

    u: Doubles  # (m, r)
    s: Doubles  # (r,)
    v: Doubles  # (n, r)


def svd_of(module: Module) -> Svd:
    """Decompose scale * b @ a without forming it.

    Raises:
        FormatError: a factor holds non-finite values.
    """
    if not (np.isfinite(module.b).all() and np.isfinite(module.a).all()):
        raise FormatError("a factor holds non-finite values")
    qb, rb = np.linalg.qr(module.b.astype(np.float64))
    qa, ra = np.linalg.qr(module.a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(module.scale * (rb @ ra.T))
    r = len(s)
    return Svd(qb @ u[:, :r], s, qa @ vt[:r].T)


class Coded(NamedTuple):
    """One side of all directions: symbols and raw bits (samples) of each, its class, and the bits they will take."""

    row: list[npt.NDArray[np.int16]]
    raw: list[npt.NDArray[np.uint16]]
    code: Ints
    bits: float


@dataclass(frozen=True)
class Fit:
    """Kept directions, module after module: index without stream lengths, both sides coded, relative error."""

    index: Index
    v: Coded
    u: Coded
    error: float

    @property
    def nbytes(self) -> float:
        """Predict the size: entropy of the levels, 1 % for the coder, 10 bits a stream, 18 a direction in the index."""
        return (1.003 * (self.v.bits + self.u.bits) + 28 * len(self.index.v)) / 8 + len(self.index.counts) / 4


def _quantize(blocks: list[Doubles]) -> tuple[list[npt.NDArray[np.int32]], Coded]:
    """Quantize the columns of every block (samples, lanes), in steps: points block by block, and the coded columns."""
    first = np.cumsum([0] + [block.shape[1] for block in blocks])
    codes = np.concatenate([allocate.fit_classes(block) for block in blocks])
    runs: dict[int, list[tuple[int, int]]] = {}  # by length: block and where the run starts
    for i, block in enumerate(blocks):
        for start, stop in cuts(len(block)) if block.shape[1] else []:
            runs.setdefault(stop - start, []).append((i, start))
    points = [np.empty(block.shape, np.int32) for block in blocks]
    levels = [np.empty(block.shape, np.int16) for block in blocks]
    grids = [np.empty(block.shape, np.uint8) for block in blocks]
    for length, members in runs.items():
        x = np.concatenate([blocks[i][at : at + length] for i, at in members], axis=1, dtype=np.float32)
        level = search(x, np.concatenate([codes[first[i] : first[i + 1]] for i, _ in members]))
        point, grid = walk(level)
        edge = 0
        for i, at in members:
            lane = slice(edge, edge := edge + blocks[i].shape[1])
            run = slice(at, at + length)
            levels[i][run], points[i][run], grids[i][run] = level[:, lane], point[:, lane], grid[:, lane]
    rows: list[npt.NDArray[np.int16]] = []
    raws: list[npt.NDArray[np.uint16]] = []
    total = 0.0
    for i, (level, grid) in enumerate(zip(levels, grids, strict=True)):
        mine = slice(first[i], first[i + 1])
        codes[mine], bits = _cheapest_classes(level, grid, codes[mine])
        total += bits
        row, raw = symbols(level, grid, codes[mine])
        rows += list(row.T)
        raws += list(raw.T)
    return points, Coded(rows, raws, codes, total)


def _cheapest_classes(level: Levels, grid: npt.NDArray[np.uint8], code: Ints) -> tuple[Ints, float]:
    """Replace each fine class by the one whose tables code its lane (a column) in the fewest bits; add the bits up."""
    lane = np.flatnonzero(code < FINE)
    width = BITS.shape[2]
    symbol = np.abs(level[:, lane]).astype(np.int64) + width * grid[:, lane] + 2 * width * np.arange(len(lane))
    count = np.bincount(symbol.ravel(), minlength=2 * width * len(lane)).reshape(len(lane), 2 * width)
    cost = count @ BITS[:, :2].reshape(FINE, 2 * width).T.astype(np.float64)
    out = code.copy()
    out[lane] = np.argmin(cost, axis=1)
    coarse = rate(code[code >= FINE]).sum() * len(level) / 256
    return out, float(cost.min(axis=1, initial=1e12).sum() + coarse) if len(lane) else float(coarse)


def fit_directions(svds: list[Svd], weight: Doubles, allocation: Allocation) -> Fit:
    """Quantize v, fit and quantize u against it, then fit the gains of each module together."""
    kept = np.split(allocation.keep, np.cumsum([len(svd.s) for svd in svds])[:-1])
    unit = weight / allocation.step
    v_point, v = _quantize([c * svd.v[:, k] * svd.s[k] for svd, k, c in zip(svds, kept, unit, strict=True)])
    targets = []
    for svd, found, c in zip(svds, v_point, unit, strict=True):
        q = found.astype(np.float64)
        gram = q.T @ q
        best = np.linalg.solve(_ridged(gram), (q.T @ svd.v) * svd.s) @ svd.u.T  # (k, m): dW ~ best^T q^T
        targets.append(c * (best * np.sqrt(np.diag(gram))[:, None]).T)
    u_point, u = _quantize(targets)
    gains, left, total = [], 0.0, 0.0
    for svd, pu, pv, w in zip(svds, u_point, v_point, weight, strict=True):
        gain, error = _gains(svd, pu.astype(np.float64), pv.astype(np.float64))
        gains.append(gain)
        left, total = left + w * w * error, total + w * w * float(svd.s @ svd.s)
    error = float(np.sqrt(max(left, 0.0) / total))
    return _assemble(gains, v, u, error)


def _assemble(gains: list[Doubles], v: Coded, u: Coded, error: float) -> Fit:
    """Leave out directions without gain, round the other gains to the precision that `error` deserves."""
    precision = int(np.clip(np.ceil(np.log2(4 / max(error, 1e-4))), 4, 15))
    gain = np.concatenate(gains)
    alive = np.flatnonzero(gain > 0)
    mantissa, exponent = split_gains(gain[alive], precision)
    v, u = (
        Coded([side.row[d] for d in alive], [side.raw[d] for d in alive], side.code[alive], side.bits)
        for side in (v, u)
    )
    counts = [int((part > 0).sum()) for part in gains]
    index = Index(counts, v.code.tolist(), u.code.tolist(), mantissa.tolist(), exponent.tolist(), [], precision)
    return Fit(index, v, u, error)


def _ridged(gram: Doubles) -> Doubles:
    ridged: Doubles = gram + np.eye(len(gram)) * (1e-10 * np.trace(gram) / max(len(gram), 1) + 1e-30)
    return ridged


def _gains(svd: Svd, p: Doubles, q: Doubles) -> tuple[Doubles, float]:
    """Solve min_g |dW - sum_j g_j p_j q_j^T|^2 over g >= 0 (directions that come out negative are dropped)."""
    h = ((svd.u.T @ p) * (svd.s[:, None] * (svd.v.T @ q))).sum(axis=0)
    gram = (p.T @ p) * (q.T @ q)
    gain = np.zeros(len(h))
    alive = h > 0
    while alive.any():
        gain[:] = 0
        gain[alive] = np.linalg.solve(_ridged(gram[np.ix_(alive, alive)]), h[alive])
        if (gain[alive] > 0).all():
            break
        alive &= gain > 0
    return gain, float(svd.s @ svd.s - 2 * gain @ h + gain @ gram @ gain)


def split_gains(gain: Doubles, precision: int) -> tuple[Ints, Ints]:
    """Round positive gains to mantissa * 2^exponent with `precision` bits after the leading one."""
    fraction, exponent = np.frexp(gain)
    mantissa = np.rint(np.ldexp(fraction, precision + 1)).astype(np.int64)
    over = mantissa == 2 << precision
    return np.where(over, 1 << precision, mantissa), exponent.astype(np.int64) - precision - 1 + over
