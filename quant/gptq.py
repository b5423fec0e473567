"""Quantisation with error feedback: columns are rounded one by one, the rest makes up for it (GPTQ, 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.quant.grid import Grid

DAMPING = 0.01  # of the mean of diag C
_BLOCK = 128  # columns whose feedback to the rest is applied at once: whole groups, at most so many where more fit


def error_feedback(w: Tensor, gram: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Return the values (m, n) of w on `grid`, float32, that approximately minimise tr((w - q) C (w - q)^T).

    gram: C = E[x x^T] (n, n) or its diagonal (n,), damped by `damping` times its mean diagonal. With the upper R,
    C = R R^T, and T = R^-1 (so C^-1 = T^T T), column j leaves (w_j - q_j) / T_jj, and columns k > j lose that times
    T_jk. Groups are fitted when their first column is reached. Columns keep their order. Raises FormatError where C
    is no second moment.
    """
    m, n = w.shape
    if gram.dim() == 1:
        gram = torch.diag(gram)
    feedback = _inverse_root(gram.double(), damping).float()
    left, out = w.float().clone(), torch.empty(m, n)
    fitted = torch.empty(0)
    block = max(_BLOCK // grid.group, 1) * grid.group
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = torch.empty(m, end - start)
        for j in range(start, end):
            if j % grid.group == 0:
                fitted = grid.fit(left[:, j : j + grid.group])
            out[:, j] = grid.snap(left[:, j : j + 1], fitted)[:, 0]
            error = (left[:, j] - out[:, j]) / feedback[j, j]
            errors[:, j - start] = error
            left[:, j + 1 : end].addr_(error, feedback[j, j + 1 : end], alpha=-1)
        left[:, end:].addmm_(errors, feedback[start:end, end:], alpha=-1)
    return out


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Return the upper T with C^-1 = T^T T, float64."""
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        raise FormatError("calibration inputs are all zero")
    damped = gram + damping * mean * torch.eye(len(gram), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise FormatError("statistics are no second moments, their matrix is not positive")
    upper = lower.flip(0, 1).contiguous()
    root: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(gram), dtype=torch.float64), upper=True)
    return root
