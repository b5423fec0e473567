"""k-means for a few hundred points: k-means++ starts, Lloyd steps, the best of several; same answer for one seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import vq

Array = NDArray[np.float64]
STARTS = 10
STEPS = 300


def cluster(points: Array, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return labels (N,) of k non-empty clusters with the least sum of squared distances over STARTS starts.

    points: (N, d), 1 <= k <= N. Lloyd, IEEE Trans. Inf. Theory 1982; seeding of Arthur and Vassilvitskii 2007.
    """
    if k == len(points):
        return np.arange(k)
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(STARTS):
        labels, cost = _lloyd(points, points[_seeds(points, k, rng)])
        if cost < least * (1 - 1e-12):
            best, least = labels, cost
    return best


def _seeds(points: Array, k: int, rng: np.random.Generator) -> list[int]:
    """Return k point indices, each drawn with probability in proportion to its squared distance to those before."""
    chosen = [int(rng.integers(len(points)))]
    far = np.square(points - points[chosen[0]]).sum(1)
    while len(chosen) < k:
        draw = rng.random()
        far[chosen] = 0.0
        total = far.sum()
        if total > 0:
            at = min(int(np.searchsorted(np.cumsum(far), draw * total, side="right")), len(points) - 1)
        else:  # only copies of chosen points are left
            at = next(i for i in range(len(points)) if i not in chosen)
        chosen.append(at)
        far = np.minimum(far, np.square(points - points[at]).sum(1))
    return chosen


def _lloyd(points: Array, centres: Array) -> tuple[NDArray[np.int64], float]:
    """Return labels and cost after Lloyd steps; an empty cluster takes the point farthest from its centre."""
    k, labels = len(centres), np.full(len(points), -1, np.int64)
    for _ in range(STEPS):
        found, distance = vq(points, centres)
        new = found.astype(np.int64)
        for empty in np.setdiff1d(np.arange(k), new):
            alone = np.bincount(new, minlength=k)[new] == 1
            at = int(np.where(alone, -1.0, distance).argmax())
            new[at], distance[at] = empty, 0.0
        if np.array_equal(new, labels):
            break
        labels = new
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, points)
        centres = sums / np.bincount(labels, minlength=k)[:, None]
    return labels, float(np.square(points - centres[labels]).sum())
