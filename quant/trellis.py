"""Trellis-coded uniform quantization: eight states, two interleaved grids, searched by Viterbi.

A sample in units of the step becomes an integer *level* k. State t of the trellis picks the grid: even t the even
integers (point 2k), odd t the odd integers and zero (point 2k - sign k); then t becomes `NEXT[t, k & 1]`. The union of
both grids has spacing 1, each alone costs the rate of spacing 2, which buys up to 1 dB over scalar quantization
(Marcellin and Fischer 1990; entropy-coded: Fischer and Wang 1992). The search minimises squared error + `RATE_PRICE`
times the code length, so the levels that come out are also cheap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adaptc.quant.rd_tables import BITS, KMAX, Ints, halvings, table

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int16]

NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], np.uint8)
RATE_PRICE = 0.4  # squared steps per bit: the slope of the operational rate-distortion curve, flat between .35 and .45

_PREVIOUS = [[(t, p) for t in range(8) for p in (0, 1) if NEXT[t, p] == s] for s in range(8)]
_FROM = np.array([[edge[j][0] for edge in _PREVIOUS] for j in (0, 1)])  # (2, 8): where the two edges into s start
_PARITY = np.array([[edge[j][1] for edge in _PREVIOUS] for j in (0, 1)])
_BRANCH = 2 * (_FROM & 1) + _PARITY  # (2, 8): which of the four (grid, parity) costs an edge pays
_ROWS = 64  # steps priced at once
_BLOCK = 1024  # lanes a block: the working set of one trellis step stays in the cache


def walk(levels: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Return the integer points of `levels` (steps, lanes) and the grid of each, every lane starting in state 0."""
    grid = np.empty(levels.shape, np.uint8)
    parity = (levels & 1).astype(np.uint8)
    state = np.zeros(levels.shape[1], np.uint8)
    flat = NEXT.ravel()
    for i in range(len(levels)):
        grid[i] = state & 1
        state = flat.take(2 * state + parity[i])
    return 2 * levels.astype(np.int32) - np.sign(levels) * grid, grid


def _branch_costs(x: Floats, codes: Ints) -> tuple[Floats, Levels]:
    """Find the cheapest level of every (grid, parity) for `x` (steps, lanes): costs and magnitudes, (steps, 4, lanes).

    Candidates are the nearest level of that parity and the next one towards zero.
    """
    line, shift = table(codes), halvings(codes)
    coarse = shift > 0
    half = 1 << shift >> 1
    top = np.where(coarse, (KMAX[line] << shift) - half - 1, KMAX[line])
    width = BITS.shape[2]
    bits_of, raw_bits = BITS.ravel(), shift.astype(np.float32)
    size = np.abs(x)
    cost, level = np.empty((len(x), 4, x.shape[1]), np.float32), np.empty((len(x), 4, x.shape[1]), np.int16)
    for grid in (0, 1):
        price = width * (3 * line + np.where(coarse, 2, grid))  # rows of BITS: even grid, odd grid, coarse
        for parity in (0, 1):
            offset = np.float32(2 * parity - grid)  # level 2 j + parity lies at max(4 j + offset, 0)
            near = np.rint((size - offset) * np.float32(0.25))
            np.clip(near, 0, ((top - parity) // 2).astype(np.float32), out=near)
            totals = []
            for j in (near, np.maximum(near - np.float32(1), 0)):
                gap = np.maximum(np.float32(4) * j + offset, 0) - size
                k = (np.float32(2) * j).astype(np.int64) + parity
                bits = bits_of.take(k + price if not coarse.any() else ((k + half) >> shift) + price, mode="clip")
                totals.append(gap * gap + np.float32(RATE_PRICE) * (bits + raw_bits if coarse.any() else bits))
            lower = (totals[1] < totals[0]) & (near > 0)
            np.minimum(totals[0], totals[1], out=cost[:, 2 * grid + parity])
            level[:, 2 * grid + parity] = np.float32(2) * (near - lower) + parity
    return cost, level


def search(x: Floats, codes: Ints) -> Levels:
    """Quantize `x` (steps, lanes), in steps, each lane with the tables of its class `codes` (lanes,); return levels."""
    out = np.empty(x.shape, np.int16)
    for kind in (False, True):
        chosen = np.flatnonzero((halvings(codes) > 0) == kind)
        for first in range(0, len(chosen), _BLOCK):
            lane = chosen[first : first + _BLOCK]
            out[:, lane] = _search_block(np.ascontiguousarray(x[:, lane]), codes[lane])
    return out


def _search_block(x: Floats, codes: Ints) -> Levels:
    steps, lanes = x.shape
    branch, level = np.empty((steps, 4, lanes), np.float32), np.empty((steps, 4, lanes), np.int16)
    for i in range(0, steps, _ROWS):
        branch[i : i + _ROWS], level[i : i + _ROWS] = _branch_costs(x[i : i + _ROWS], codes)
    cost = np.full((8, lanes), np.float32(1e30))
    cost[0] = 0.0
    took = np.empty((steps, 8, lanes), np.bool_)
    a, b, edge = np.empty((8, lanes), np.float32), np.empty((8, lanes), np.float32), np.empty((8, lanes), np.float32)
    for i in range(steps):
        np.take(cost, _FROM[0], axis=0, out=a, mode="clip")
        np.take(branch[i], _BRANCH[0], axis=0, out=edge, mode="clip")
        a += edge
        np.take(cost, _FROM[1], axis=0, out=b, mode="clip")
        np.take(branch[i], _BRANCH[1], axis=0, out=edge, mode="clip")
        b += edge
        np.less(b, a, out=took[i])
        np.minimum(a, b, out=cost)
        if i % 256 == 255:
            cost -= cost.min(axis=0)  # keep float32 sums small
    state = cost.argmin(axis=0)
    lane = np.arange(lanes)
    out = np.empty((steps, lanes), np.int16)
    for i in range(steps - 1, -1, -1):
        edge_taken = took[i].ravel().take(state * lanes + lane).view(np.uint8)
        row = edge_taken * 8 + state
        out[i] = level[i].ravel().take(_BRANCH.ravel().take(row) * lanes + lane)
        state = _FROM.ravel().take(row)
    return np.where(x < 0, -out, out).astype(np.int16)
