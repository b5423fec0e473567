"""lego: rank-one units of all inputs, clustered; one rank of the result a cluster."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptc.squeeze.joint import Part
from adaptc.squeeze.kmeans import cluster
from adaptc.squeeze.method import Method, Pair, Task

Array = NDArray[np.float64]


def merge(task: Task) -> Pair:
    """Return b, a of rank k from k clusters of minimal semantic units (a_j, b_j), dW_t = sum_j b_j a_j.

    The units of all inputs are clustered by k-means on [a_j; b_j]; each cluster becomes its mean mu, lengthened to the
    members' mean largest entry (mu *= mean_j |m_j|_inf / |mu|_inf), and every b is multiplied by sqrt(r / k), r the
    units an input has on average. LoRA-LEGO, arXiv 2409.16167.

    A unit is only defined up to the gauge (B G, G^-1 A), and on raw factors the result is a matter of it: the same dW
    written with flipped signs merges to something 90 % different. So with gauge "balanced" units are
    sqrt(sigma_j) (v_j, u_j) of the SVD of each dW_t, signs aligned along a maximum spanning tree of |cosine|; the
    result then depends on the deltas alone, where their singular values are distinct. "raw" takes rows and columns as
    stored, as the paper does. Weights scale units by their ratio, T w_t / sum |w|; a negative one turns b.

    When not to use it: as a way to keep the sum of deltas. Clusters average what they hold, `exact` loses less.
    """
    frame, opts = task.joint, task.options
    total = sum(abs(w) for w in task.weights)
    a_units, b_units = [], []
    for p, m, w in zip(task.parts, frame.cores, task.weights, strict=True):
        left, right = _raw(task, p) if opts.gauge == "raw" else _balanced(m)
        root = math.sqrt(len(task.parts) * abs(w) / total)
        a_units.append(right * root)
        b_units.append(left.mT * math.copysign(root, w))
    a, b = torch.cat(a_units).cpu().numpy(), torch.cat(b_units).cpu().numpy()  # (N, q), (N, p)
    if opts.gauge != "raw":
        signs = align(a, b)
        a, b = a * signs[:, None], b * signs[:, None]
    k = min(task.rank, len(a))
    labels = cluster(np.concatenate([a, b], 1), k, task.rng())
    return _centroids(task, torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(labels), k)


def _balanced(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U sqrt(sigma), sqrt(sigma) V^T) of m (p, q), directions of rounding noise left out."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    k = int((s > 1e-12 * s.max()).sum()) if len(s) else 0
    root = s[:k].sqrt()
    return u[:, :k] * root, root[:, None] * vh[:k]


def _raw(task: Task, p: Part) -> tuple[Tensor, Tensor]:
    """Return the stored columns of B and rows of A of one part in joint coordinates, sqrt(scale) on both."""
    frame, (b, a) = task.joint, p.balanced()
    return frame.map_b.mT @ (frame.b.double().mT @ b), (a @ frame.a.double().mT) @ frame.map_a.mT


def align(a: Array, b: Array) -> Array:
    """Return signs (N,) of +-1 so that units that lie nearly on one line point the same way.

    Prim's algorithm: starting from the longest unit, the unit with the largest |cosine| to a placed one is placed next,
    with the sign that makes this cosine positive. Independent of the signs that went in, up to one for all.
    """
    gram = a @ a.T + b @ b.T
    length = np.sqrt(np.diag(gram)).clip(np.finfo(np.float64).tiny)
    cosine = gram / np.outer(length, length)
    signs, placed = np.zeros(len(a)), int(length.argmax())
    signs[placed] = 1.0
    best, parent = np.abs(cosine[placed]), np.full(len(a), placed)
    for _ in range(len(a) - 1):
        best = np.where(signs != 0, -1.0, best)
        j = int(best.argmax())
        signs[j] = signs[parent[j]] * (1.0 if cosine[parent[j], j] >= 0 else -1.0)
        closer = np.abs(cosine[j]) > best
        best, parent = np.where(closer, np.abs(cosine[j]), best), np.where(closer, j, parent)
    return signs


def _centroids(task: Task, a: Tensor, b: Tensor, labels: Tensor, k: int) -> Pair:
    """Return the reweighted cluster means as factors; a (N, q), b (N, p) joint coordinates of the units."""
    frame, how = task.joint, task.options.reweight
    device = frame.b.device
    full_a, full_b = frame.right(a.to(device)), frame.left(b.T.to(device)).mT  # (N, n), (N, m)
    member = torch.nn.functional.one_hot(labels.to(device), k).double()  # (N, k)
    mean = (member / member.sum(0)).mT
    mu_a, mu_b = mean @ full_a, mean @ full_b
    if how in ("both", "parameter"):
        peak = torch.maximum(full_a.abs().amax(1), full_b.abs().amax(1))
        longest = torch.maximum(mu_a.abs().amax(1), mu_b.abs().amax(1))
        factor = torch.where(longest > 0, mean @ peak / longest.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        mu_a, mu_b = mu_a * factor[:, None], mu_b * factor[:, None]
    if how in ("both", "output"):
        mu_b = mu_b * math.sqrt(len(a) / len(task.parts) / k)
    return Pair(mu_b.mT, mu_a)


METHOD = Method(
    name="lego", run=merge, space="rank-one units in the balanced SVD gauge (--gauge raw: as stored, as in the paper)",
    exact="not the weighted sum: clusters of units become their means",
    paper="Zhao 2024, arXiv 2409.16167", avoid="keeping the sum of deltas: exact loses less at every rank",
    options=frozenset({"seed", "gauge", "reweight"}), averages=True,
)
