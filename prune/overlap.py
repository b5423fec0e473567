"""How far two sparse deltas get in each other's way when both are added to one weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, svds

from adaptc.delta import Sparse

_BLOCK = 1 << 22  # nonzeros of S1^T S2 that are counted at a time


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of S1 and S2 (m, n): dot <S1, S2>, how many entries both store and how many of those differ in sign; and

    awom ||S1^T S2||_2 and awor 1 - nnz(S1^T S2) / n^2, adapter weight orthogonality in magnitude and ratio: 0 and 1
    for supports that share no row. SHiRA, arXiv 2406.13175.
    """

    dot: float
    common: int
    conflicts: int
    awom: float
    awor: float


def overlap(x: Sparse, y: Sparse) -> Overlap:
    """Return how two deltas of one shape overlap; nothing of their dense size is formed but in row blocks of S1^T S2.

    The norm is a Lanczos iteration on v -> S1^T (S2 v), the count a symbolic product.
    """
    one, two = matrix(x), matrix(y)
    both = one.multiply(two)
    return Overlap(float(both.sum()), int(_pattern(one).multiply(_pattern(two)).nnz), int((both.data < 0).sum()),
                   awom(one, two), awor(one, two))


def matrix(delta: Sparse) -> sp.csr_array:
    """Return scale * S (m, n) in float64 on its (out, prod(rest)) view."""
    m, n = delta.shape[0], math.prod(delta.shape[1:])
    places, values = delta.places().numpy(), delta.values.double().numpy() * delta.scale
    starts = np.searchsorted(places, np.arange(m + 1) * n)
    return sp.csr_array((values, places % n, starts), shape=(m, n))


def awom(one: sp.csr_array, two: sp.csr_array) -> float:
    """Return the largest singular value of one^T two."""
    n = one.shape[1]
    rows = np.intersect1d(np.flatnonzero(np.diff(one.indptr)), np.flatnonzero(np.diff(two.indptr)))
    one, two = one[rows], two[rows]
    if not len(rows) or not one.nnz or not two.nnz:
        return 0.0
    if n < 3:
        return float(np.linalg.norm((one.T @ two).toarray(), 2))
    both = LinearOperator((n, n), matvec=lambda v: one.T @ (two @ v), rmatvec=lambda v: two.T @ (one @ v), dtype=float)
    start = np.random.default_rng(0).standard_normal(n)
    return float(svds(both, k=1, v0=start, return_singular_vectors=False, tol=1e-10)[0])


def awor(one: sp.csr_array, two: sp.csr_array) -> float:
    """Return 1 - nnz(one^T two) / n^2 by supports: what cancels by chance counts as there."""
    n = one.shape[1]
    left, right = _pattern(one).T.tocsr(), _pattern(two)
    step = max(1, _BLOCK // max(n, 1))
    count = sum(int((left[i : i + step] @ right).nnz) for i in range(0, n, step))
    return 1.0 - count / float(n * n)


def _pattern(s: sp.csr_array) -> sp.csr_array:
    return sp.csr_array((np.ones(s.nnz, bool), s.indices, s.indptr), shape=s.shape)
