"""ties: trim, elect a sign, average what agrees with it."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze.method import Method, Result, Task, in_canonical_core, in_factors


def trim(x: Tensor, density: float) -> Tensor:
    """Return x (T, ...) with the int(density * size) entries of largest magnitude of each x_t, zero elsewhere."""
    if density >= 1:
        return x
    flat = x.flatten(1)
    keep = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, keep, flat.gather(1, keep)).reshape(x.shape)


def disjoint(x: Tensor, votes: Tensor, share: Tensor) -> Tensor:
    """Return sum_{t in J} x_t / sum_{t in J} share_t, J the inputs whose vote has the sign of the sum of votes.

    x, votes: (T, ...); share: (T,) positive. Zero where nobody votes.
    """
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(x.dtype)
    agrees = (votes.sign() == elected).to(x.dtype)
    weight = torch.einsum("t,t...->...", share, agrees)
    return (x * agrees).sum(0) / torch.where(weight > 0, weight, torch.ones_like(weight))


def elect(x: Tensor, task: Task) -> Tensor:
    """Return the weighted disjoint mean: sum_J w_t x_t / sum_J |w_t|, signs elected on w_t x_t."""
    weighted = torch.einsum("t,t...->t...", task.w, x)
    return disjoint(weighted, weighted, task.w.abs())


def entries(x: Tensor, task: Task) -> Tensor:
    """Trim, elect, average: x (T, ...) to (...)."""
    return elect(trim(x, task.options.density), task)


def merge(task: Task) -> Result:
    """Merge in the canonical joint core, or with space "factors" on A and B apart as PEFT's "ties" does.

    TIES-Merging, arXiv 2306.01708, defines it on all weights of the model at once; here trimming is per parameter, on
    the entries of M_t. Weights act before the election (a negative one votes the other way) and only by their ratio;
    in factor space after it, as in PEFT. When not to use it: for two inputs of one task, where `exact` is better.
    """
    return in_factors(factors, task) if task.options.space == "factors" else in_canonical_core(entries)(task)


def factors(x: Tensor, v: Tensor, task: Task, side: int) -> Tensor:
    """Return PEFT's rule for one factor: signs elected before weights, divided by the number that agree."""
    x = trim(x, task.options.density)
    return disjoint(torch.einsum("t,t...->t...", v, x), x, torch.ones_like(v))


METHOD = Method(
    name="ties", run=merge, entries=entries, space="canonical joint core (--space factors: A and B apart, PEFT parity)",
    exact="not the weighted sum: small and outvoted entries are dropped",
    paper="Yadav 2023, arXiv 2306.01708", avoid="inputs of one task, and few inputs that hardly conflict",
    options=frozenset({"density", "space"}), averages=True,
)
