"""tsv: the strongest singular directions of each input, made orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze.method import InCore, Method, Task


def merge(task: Task) -> InCore:
    """Return U_p diag(w_t sigma) V_p^T from the leading rank/T singular triples of every input.

    U_p = P Q^T is the orthogonal polar factor of the concatenated left vectors P S Q^T, V_p likewise. TSV-M, arXiv
    2412.00081. Ranks are dealt out evenly, what does not divide to the first inputs. When not to use it: with weights
    of very different size, because whitening gives every direction its full length again.
    """
    frame, count = task.joint, len(task.parts)
    rank, left, sigma, right = min(task.rank, *frame.cores.shape[1:]), [], [], []
    for t, (m, w) in enumerate(zip(frame.cores, task.weights, strict=True)):
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        k = min(rank // count + (t < rank % count), int((s > 1e-12 * s[0]).sum()))
        left.append(u[:, :k])
        sigma.append(w * s[:k])
        right.append(vh[:k])
    return InCore(frame, (polar(torch.cat(left, 1)) * torch.cat(sigma)) @ polar(torch.cat(right, 0).mT).mT)


def polar(x: Tensor) -> Tensor:
    """Return P Q^T for the SVD x = P S Q^T: the nearest matrix with orthonormal columns. x: (p, k), k <= p."""
    p, _, qh = torch.linalg.svd(x, full_matrices=False)
    product: Tensor = p @ qh
    return product


METHOD = Method(
    name="tsv", run=merge, space="joint core (any orthonormal basis gives the same)",
    exact="not the weighted sum: rank/T directions an input, whitened",
    paper="Gargiulo 2024, arXiv 2412.00081 (TSV-M)", avoid="a rank below a few times the number of inputs",
)
