"""cat: factors side by side, the weighted sum without any truncation."""

from __future__ import annotations

import torch

from adaptc.squeeze.exact import entries
from adaptc.squeeze.joint import Part
from adaptc.squeeze.method import Method, Pair, Task


def merge(task: Task) -> Pair:
    """Return b = [w_1 s_1 B_1 ... w_T s_T B_T], a = [A_1; ...; A_T], rank sum_t r_t.

    Inputs that share one A (or one B) bit for bit (FFA-LoRA) are added on the other side instead and take one rank set.
    What PEFT calls "cat". When not to use it: every input adds its rank to the size and to the time of each forward
    pass; `exact` with a rank keeps almost as much in less.
    """
    groups: list[tuple[torch.Tensor, torch.Tensor]] = []
    for p, w in zip(task.parts, task.weights, strict=True):
        b, a = scaled(p, w)
        for i, (b0, a0) in enumerate(groups):
            if a0.shape == a.shape and torch.equal(a0, a):
                groups[i] = (b0 + b, a0)
                break
        else:
            groups.append((b, a))
    return Pair(torch.cat([b for b, _ in groups], 1), torch.cat([a for _, a in groups], 0))


def scaled(p: Part, w: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 (w s B core, A)."""
    return p.b.double() @ (p.middle * w), p.a.double()


METHOD = Method(
    name="cat", run=merge, entries=entries, space="factors, side by side",
    exact="the weighted sum, exactly; rank is the sum of ranks unless --rank cuts it",
    paper="none: block matrices", avoid="many inputs: rank, size and run time add up", lossless=True,
)
