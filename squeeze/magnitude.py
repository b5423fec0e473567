"""magnitude: keep the largest entries of each input, then add."""

from __future__ import annotations

from torch import Tensor

from adaptc.squeeze import exact, linear, ties
from adaptc.squeeze.method import Method, Result, Task, in_canonical_core, in_factors


def entries(x: Tensor, task: Task) -> Tensor:
    """Return sum_t w_t trim(x_t): x (T, ...) to (...)."""
    return exact.entries(ties.trim(x, task.options.density), task)


def merge(task: Task) -> Result:
    """Trim M_t to its `density` largest entries in the canonical joint core, then add with weights.

    space "factors" trims A and B apart, as PEFT's "magnitude_prune" does. When not to use it: to make an adapter
    smaller; truncation removes less for the same bytes.
    """
    return in_factors(factors, task) if task.options.space == "factors" else in_canonical_core(entries)(task)


def factors(x: Tensor, v: Tensor, task: Task, side: int) -> Tensor:
    """Return PEFT's rule for one factor."""
    return linear.add(ties.trim(x, task.options.density), v, task, side)


METHOD = Method(
    name="magnitude", run=merge, entries=entries,
    space="canonical joint core (--space factors: A and B apart, PEFT parity)",
    exact="the weighted sum at density 1, below it without each input's small entries",
    paper="magnitude pruning; PEFT magnitude_prune", avoid="saving bytes: truncation loses less",
    options=frozenset({"density", "space"}),
)
