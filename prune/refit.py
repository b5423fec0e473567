"""What removing inputs does to a layer's output, measured on calibration moments, and its least-squares repair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.calibration import SPLITS, Calibration, Split
from adaptc.errors import NeedsError
from adaptc.prune.cuts import Cut
from adaptc.prune.importance import Merged

DAMP = 1e-4


@dataclass(frozen=True, slots=True)
class Loss:
    """E||M x - M' x_K||^2 and E||M x||^2 of one layer on one split of the calibration tokens."""

    key: str
    split: Split
    lost: float
    total: float


def removal(weights: Merged, calibration: Calibration, key: str, cut: Cut, *, refit: bool = False
            ) -> tuple[Tensor | None, list[Loss]]:
    """Return the repaired base weight (m, kept) in float64, None without `refit`, and the measured output losses.

    With K the inputs that stay, P those that go and C = E[x x^T] of the training split, the best weight on x_K is
    M C_:K C_KK^-1 = M_K + M_P T, T = C_PK C_KK^-1: the base takes M_P T and the adapter stays as it was sliced. C_KK
    is damped by 1e-4 of its mean diagonal. On any split the loss is tr(M_P S M_P^T) with S = C_PP - T C_KP - C_PK T^T
    + T C_KK T^T. M is held in row blocks. A diagonal of C gives the losses of uncorrelated inputs and no repair.
    Raises NeedsError without moments of the inputs.
    """
    assert cut.cols is not None
    m, n = cut.shape
    gone = torch.ones(n, dtype=torch.bool)
    gone[cut.cols] = False
    p, k = gone.nonzero().flatten(), cut.cols
    train = calibration.gram(key, n)
    if refit and train.dim() == 1:
        raise NeedsError(f"{key}: calibration holds only the diagonal of the inputs' moment, --refit needs all of it",
                         hint="adaptc calibrate without --diagonal")
    t = _transfer(train, p, k) if refit else None
    grams = {split: train if split == "train" else calibration.gram(key, n, split)
             for split in SPLITS if calibration.moment(key, split) is not None}
    residual = {split: _residual(c, p, k, t) for split, c in grams.items()}
    lost, total = dict.fromkeys(grams, 0.0), dict.fromkeys(grams, 0.0)
    repaired = torch.empty(m, len(k), dtype=torch.float64) if refit else None
    for rows, w, dw in weights.blocks(key):
        full = w if dw is None else w + dw
        part = full[:, p]
        for split, c in grams.items():
            lost[split] += _energy(part, residual[split])
            total[split] += _energy(full, c)
        if repaired is not None and t is not None:
            torch.addmm(w[:, k], part, t, out=repaired[rows])
    return repaired, [Loss(key, split, max(lost[split], 0.0), total[split]) for split in grams]


def _transfer(c: Tensor, p: Tensor, k: Tensor) -> Tensor:
    """Return T = C_PK C_KK^-1 (p, k) by Cholesky, C_KK damped."""
    kk = c[k][:, k]
    kk.diagonal().add_(DAMP * float(kk.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    return torch.cholesky_solve(c[k][:, p], torch.linalg.cholesky(kk)).mT.contiguous()


def _residual(c: Tensor, p: Tensor, k: Tensor, t: Tensor | None) -> Tensor:
    """Return E[e e^T] of e = x_P - T x_K (p, p), of e = x_P without T; its diagonal where C is one."""
    if c.dim() == 1:
        return c[p]
    if t is None:
        return c[p][:, p]
    cross = c[p][:, k] @ t.mT
    return c[p][:, p] - cross - cross.mT + t @ c[k][:, k] @ t.mT


def _energy(w: Tensor, c: Tensor) -> float:
    return float(((w * c if c.dim() == 1 else w @ c) * w).sum())
