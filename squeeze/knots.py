"""knots: TIES on right factors that all inputs share a left basis for."""

from __future__ import annotations

import torch

from adaptc.squeeze import ties
from adaptc.squeeze.method import Method, Pair, Task


def merge(task: Task) -> Pair:
    """Return U @ ties(S V_1^T, ..., S V_T^T) for the SVD [dW_1 ... dW_T] = U S [V_1^T ... V_T^T].

    KnOTS-TIES, arXiv 2410.19735. The SVD is taken in the joint core; S V_t^T = U^T dW_t has size (p, n), the largest
    thing formed. When not to use it: with few inputs it is TIES with only the output side aligned; try `ties` too.
    """
    frame = task.joint.canonical()
    eye = torch.eye(frame.cores.shape[1], dtype=torch.float64, device=frame.b.device)
    aligned = torch.stack([frame.right(m) for m in frame.cores])  # (T, p, n)
    return Pair(frame.left(eye), ties.entries(aligned, task))


METHOD = Method(
    name="knots", run=merge, space="shared left singular basis by input coordinates",
    exact="not the weighted sum: small and outvoted entries are dropped",
    paper="Stoica 2024, arXiv 2410.19735", avoid="very wide inputs in little memory: it holds T x R x n numbers",
    options=frozenset({"density"}), averages=True,
)
