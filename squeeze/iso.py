"""iso: the weighted sum with all its singular values made equal."""

from __future__ import annotations

import torch

from adaptc.squeeze.method import InCore, Method, Task


def merge(task: Task) -> InCore:
    """Return mean(sigma_1..k) * U_k V_k^T for the SVD of sum_t w_t dW_t and k the rank wanted.

    Iso-C, arXiv 2502.04959, takes the mean over all singular values of the dense sum; a flat spectrum has no best
    truncation, so the mean runs over the k directions that are kept. When not to use it: with one strong input, whose
    noise directions become as loud as its signal.
    """
    frame = task.joint
    u, s, vh = torch.linalg.svd(frame.weighted(task.weights), full_matrices=False)
    k = min(task.rank, int((s > 1e-12 * s[0]).sum()))
    return InCore(frame, (u[:, :k] @ vh[:k]) * (s[:k].mean() if k else 0.0))


METHOD = Method(
    name="iso", run=merge, space="joint core (any orthonormal basis gives the same)",
    exact="directions of the weighted sum, its singular values flattened",
    paper="Marczak 2025, arXiv 2502.04959 (Iso-C)", avoid="inputs of very different strength, and large ranks of noise",
)
