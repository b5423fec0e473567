"""dare-linear and dare-ties: drop entries at random, rescale the rest, then add or elect."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.squeeze import exact, linear, ties
from adaptc.squeeze.method import Method, Result, Task, in_canonical_core, in_factors


def drop(x: Tensor, task: Task, stream: int = 0) -> Tensor:
    """Return mask o x / density with a Bernoulli(density) mask of its own for every entry of x (T, ...).

    The mask comes from the seed and the parameter's name, on the CPU, so it is the same on every device and machine.
    """
    density = task.options.density
    if density >= 1:
        return x
    mask = torch.from_numpy(task.rng(stream).random(tuple(x.shape)) < density)
    return x * mask.to(x) / density


def add_entries(x: Tensor, task: Task) -> Tensor:
    """Return sum_t w_t drop(x_t)."""
    return exact.entries(drop(x, task), task)


def elect_entries(x: Tensor, task: Task) -> Tensor:
    """Return the weighted disjoint mean of drop(x_t)."""
    return ties.elect(drop(x, task), task)


def merge_linear(task: Task) -> Result:
    """Drop entries of M_t in the canonical joint core, rescale by 1/density, add with weights; unbiased.

    DARE, arXiv 2311.03099, defines it on the entries of dW. space "factors" does it on A and B apart, as PEFT's
    "dare_linear" does, where the product is no longer unbiased. When not to use it: low-rank deltas have no redundant
    entries to drop, so at small densities it only adds noise.
    """
    if task.options.space == "factors":
        return in_factors(add_factors, task)
    return in_canonical_core(add_entries)(task)


def merge_ties(task: Task) -> Result:
    """Drop and rescale as above, then elect signs and average what agrees (weights by ratio only).

    DARE with TIES, arXiv 2311.03099 and 2306.01708. When not to use it: as `dare-linear`.
    """
    if task.options.space == "factors":
        return in_factors(elect_factors, task)
    return in_canonical_core(elect_entries)(task)


def add_factors(x: Tensor, v: Tensor, task: Task, side: int) -> Tensor:
    """Return PEFT's dare_linear for one factor."""
    return linear.add(drop(x, task, 1 + side), v, task, side)


def elect_factors(x: Tensor, v: Tensor, task: Task, side: int) -> Tensor:
    """Return PEFT's dare_ties for one factor."""
    x = drop(x, task, 1 + side)
    return ties.disjoint(torch.einsum("t,t...->t...", v, x), x, torch.ones_like(v))


_SPACE = "canonical joint core (--space factors: A and B apart, PEFT parity)"
_OPTIONS = frozenset({"density", "seed", "space"})
_PAPER = "Yu 2023, arXiv 2311.03099"
LINEAR = Method(
    name="dare-linear", run=merge_linear, entries=add_entries, space=_SPACE, options=_OPTIONS, paper=_PAPER,
    exact="the weighted sum in expectation; one draw is off by about sqrt((1 - density) / density)",
    avoid="low-rank inputs at small density: it only adds noise",
)
TIES = Method(
    name="dare-ties", run=merge_ties, entries=elect_entries, space=_SPACE, options=_OPTIONS, paper=_PAPER,
    averages=True,
    exact="not the weighted sum: random drops, then outvoted entries dropped",
    avoid="low-rank inputs at small density: it only adds noise",
)
