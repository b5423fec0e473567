"""fedavg, fedex, lora-fair: what a federated server makes of its clients' factors."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze import cat, exact
from adaptc.squeeze.factored import truncate
from adaptc.squeeze.method import Method, Pair, Task

# Ridge of LoRA-FAIR relative to the mean eigenvalue of A A^T: the paper's lambda, made free of the scale of A.
FAIR_RIDGE = 0.01


def balanced(task: Task) -> tuple[Tensor, Tensor]:
    """Return float64 stacks b (T, m, r), a (T, r, n) with sqrt|s| on both sides, ranks padded with zeros (HetLoRA)."""
    pairs = [p.balanced() for p in task.parts]
    r = max(a.shape[0] for _, a in pairs)
    pad = torch.nn.functional.pad
    return (torch.stack([pad(b, (0, r - b.shape[1])) for b, _ in pairs]),
            torch.stack([pad(a, (0, 0, 0, r - a.shape[0])) for _, a in pairs]))


def shared(task: Task) -> Pair | None:
    """Return the exact average of inputs that share one A, or one B, bit for bit (FFA-LoRA); None for others."""
    held = [(p, w) for p, w in zip(task.parts, task.weights, strict=True) if p.a.shape[0]]
    first = held[0][0]
    if all(p.a.shape == first.a.shape and torch.equal(p.a, first.a) for p, _ in held):
        return cat.merge(task)
    if all(p.core is None and p.b.shape == first.b.shape and torch.equal(p.b, first.b) for p, _ in held):
        return Pair(first.b.double(), torch.stack([p.a.double() * (p.scale * w) for p, w in held]).sum(0))
    return None


def average(task: Task) -> Pair:
    """Return b = sum_t w_t B_t, a = sum_t w_t A_t, weights summing to 1.

    Plain FedAvg of LoRA (FedIT, arXiv 2305.05644): sum w BA is not (sum w B)(sum w A), so it carries cross terms.
    When all inputs share one frozen A (FFA-LoRA, arXiv 2403.12313) or one B, this is recognised and the average is
    exact. When not to use it: for adapters that were not trained in rounds from one initialisation.
    """
    exactly = shared(task)
    if exactly is not None:
        return exactly
    b, a = balanced(task)
    return Pair(torch.einsum("t,tmr->mr", task.w, b), torch.einsum("t,trn->rn", task.w, a))


def fedex(task: Task) -> Pair:
    """Return [B', R_b], [A'; R_a]: the plain average and, as extra ranks, what it lacks of sum_t w_t dW_t.

    FedEx-LoRA, arXiv 2410.09432, adds the residual sum_t w_t (B_t - B')(A_t - A') to the base model; its rank is at
    most (T - 1) r, so it fits into an adapter, exactly. A smaller rank truncates the residual, never the average.
    """
    exactly = shared(task)
    if exactly is not None:
        return exactly
    b, a = balanced(task)
    mean_b, mean_a = torch.einsum("t,tmr->mr", task.w, b), torch.einsum("t,trn->rn", task.w, a)
    count, m, r = b.shape
    room = min(task.rank - r, (count - 1) * r)
    if room <= 0:
        return Pair(mean_b, mean_a)
    off_b = ((b - mean_b) * task.w[:, None, None]).permute(1, 0, 2).reshape(m, count * r)
    rest = truncate(off_b, (a - mean_a).reshape(count * r, -1), min(room, m, a.shape[2]))
    return Pair(torch.cat([mean_b, rest.b], 1), torch.cat([mean_a, rest.a], 0))


def fair(task: Task) -> Pair:
    """Return b = B' + E, a = A' with E = argmin ||dW - (B' + E) A'||_F^2 + l ||E||_F^2, dW = sum_t w_t dW_t.

    LoRA-FAIR, arXiv 2411.14961, corrects B on the server so that the product comes close to the true average without
    extra rank; it descends on a cosine loss with a penalty, here the squared distance has its ridge solution in closed
    form, E = (dW - B' A') A'^T (A' A'^T + l I)^-1, computed from factors. l is 0.01 of the mean eigenvalue of A' A'^T.
    When not to use it: once, on finished adapters, where `exact` at the same rank is the optimum it approaches.
    """
    exactly = shared(task)
    if exactly is not None:
        return exactly
    b, a = balanced(task)
    mean_b, mean_a = torch.einsum("t,tmr->mr", task.w, b), torch.einsum("t,trn->rn", task.w, a)
    own = mean_a @ mean_a.mT
    wanted = torch.einsum("t,tmr,trk->mk", task.w, b, a @ mean_a.mT) - mean_b @ own
    ridge = FAIR_RIDGE * own.diagonal().mean() * torch.eye(len(own)).to(own)
    return Pair(mean_b + torch.linalg.solve(own + ridge, wanted.mT).mT, mean_a)


METHOD = Method(
    name="fedavg", run=average, entries=exact.entries, space="factors, A and B apart", averages=True,
    positive=True,
    exact="exact when all inputs share one A or one B (FFA-LoRA), else with cross terms",
    paper="FedIT, arXiv 2305.05644; FFA-LoRA, arXiv 2403.12313", avoid="adapters not trained in rounds from one start",
)
FEDEX = Method(
    name="fedex", run=fedex, entries=exact.entries, space="factors, residual as extra ranks", averages=True,
    lossless=True, positive=True,
    exact="the weighted average, exactly; --rank truncates the residual only",
    tight="this rank holds the average of the factors alone, without fedex's residual",
    paper="Singhal 2024, arXiv 2410.09432", avoid="finished adapters under a rank limit: exact is the optimum",
)
FAIR = Method(
    name="lora-fair", run=fair, entries=exact.entries, space="factors, B corrected towards the average", averages=True,
    positive=True,
    exact="the best B for the averaged A, up to the ridge",
    paper="Bian 2024, arXiv 2411.14961", avoid="finished adapters: exact at the same rank is closer",
)
