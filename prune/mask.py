"""Which entries of a delta a sparse adapter keeps: the highest scores, a seeded draw, or whole rows and columns."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.prune.view import View, blocks

SCORED = ("magnitude", "activation", "snip")
DRAWN = ("random", "struct")
MASKS = (*SCORED, *DRAWN)
_CLASSES = 1 << 15  # of float32 scores by exponent and seven bits: 0.8 % wide

Ints = npt.NDArray[np.int64]


def scores(seen: View, norms: Tensor | None = None, w0: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (flat start, scores) of row blocks: |dW|, times ||x_j|| by `norms` (n,), times |W0| by `w0` (m, n)."""
    for start, stop in blocks(seen):
        score = seen.rows(start, stop).abs_()
        if norms is not None:
            score *= norms
        if w0 is not None:
            score *= w0[start:stop].float().abs()
        yield start * seen.n, score.reshape(-1)


def largest(scored: Iterator[tuple[int, Tensor]], k: int) -> Tensor:
    """Return the positions of the k highest scores, rising; fewer where not so many are above 0.

    One pass over the blocks with a threshold that rises as better entries are found; never more than 2 k entries and a
    block are held. Of equal scores the lowest positions win, whatever the blocks.
    """
    held, places = np.zeros(0, np.float32), np.zeros(0, np.int64)
    floor = np.float32(0.0)
    for start, block in scored:
        score = block.numpy()
        hit = np.flatnonzero(score > floor)
        held, places = np.concatenate([held, score[hit]]), np.concatenate([places, hit + start])
        if len(held) > 2 * k:
            held, places, floor = _best(held, places, k)
    return torch.from_numpy(_best(held, places, k)[1])


def _best(held: npt.NDArray[np.float32], places: Ints, k: int) -> tuple[npt.NDArray[np.float32], Ints, np.float32]:
    if len(held) <= k:
        return held, places, np.float32(0.0)
    if k == 0:
        return held[:0], places[:0], np.float32(np.inf)
    floor = np.partition(held, len(held) - k)[len(held) - k]
    keep = held > floor
    keep[np.flatnonzero(held == floor)[: k - int(keep.sum())]] = True
    return held[keep], places[keep], floor


def classes(scored: Iterator[tuple[int, Tensor]]) -> Ints:
    """Return how many scores above 0 fall into each class, low to high."""
    made = np.zeros(_CLASSES, np.int64)
    for _, block in scored:
        score = block.numpy()
        made += np.bincount(score[score > 0].view(np.int32) >> 16, minlength=_CLASSES)
    return made


def shares(counts: Sequence[Ints], total: int) -> list[int]:
    """Return how many entries each module keeps when the `total` highest scores of all modules are kept.

    Whole classes first; the class that does not fit is shared in proportion, so the sum is exact.
    """
    above = np.cumsum(np.stack(counts)[:, ::-1], axis=1)  # of each module, from the top class down
    everything = above.sum(0)
    if total >= everything[-1]:
        return [int(v) for v in above[:, -1]]
    last = int(np.searchsorted(everything, total, side="right"))
    before = above[:, last - 1] if last else np.zeros(len(counts), np.int64)
    here = above[:, last] - before
    left = total - int(before.sum())
    part = here * left / max(int(here.sum()), 1)
    made = before + np.floor(part).astype(np.int64)
    short = np.argsort(np.floor(part) - part, kind="stable")[: total - int(made.sum())]
    made[short] += 1
    return [int(v) for v in made]


def drawn(key: str, m: int, n: int, k: int, seed: int) -> Tensor:
    """Return k distinct positions of an (m, n) matrix, rising, uniform, the same for a seed and a parameter name."""
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    if 4 * k >= m * n:
        places: npt.NDArray[Any] = rng.permutation(m * n)[:k]
    else:
        places = np.zeros(0, np.int64)
        while len(places) < k:
            places = np.unique(np.concatenate([places, rng.integers(m * n, size=k + k // 4 + 16)]))
        places = rng.permutation(places)[:k]
    return torch.from_numpy(np.sort(places).astype(np.int64))


def struct(m: int, n: int, k: int) -> Tensor:
    """Return k positions: the diagonal, evenly spaced rows and columns with half of the rest each, then row by row.

    Training on such a mask is a rank-one change and a diagonal (SHiRA-Struct).
    """
    diagonal = np.arange(min(m, n)) * (n + 1)
    if k <= len(diagonal):
        return torch.from_numpy(diagonal[np.arange(k) * len(diagonal) // max(k, 1)].copy())
    rest = k - len(diagonal)
    chosen = np.zeros((m, n), bool)
    chosen.reshape(-1)[diagonal] = True
    rows, columns = min(rest // (2 * n), m), min(rest // (2 * m), n)
    chosen[np.arange(rows) * m // max(rows, 1)] = True
    chosen[:, np.arange(columns) * n // max(columns, 1)] = True
    free = np.flatnonzero(~chosen.reshape(-1))
    chosen.reshape(-1)[free[: k - int(chosen.sum())]] = True
    return torch.from_numpy(np.flatnonzero(chosen.reshape(-1)))
