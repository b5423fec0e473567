"""Importance of base weights from the gradients at a low-rank adapter's factors (LoRAPrune, Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.calibration import Gradient
from adaptc.errors import FormatError

KEEP = 0.9  # of the moving average, a batch
_BLOCK = 1 << 20  # entries of the row blocks in which a weight meets its gradient


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (b', a') with b' a' = b a and b'^T b' = a' a'^T, in float64.

    b = Q_b R_b, a^T = Q_a R_a, R_b R_a^T = U S V^T; b' = Q_b U S^(1/2), a' = S^(1/2) V^T Q_a^T. Gradients at factors
    depend on how a product is shared between them: b -> c b, a -> a / c leaves the model as it is and moves the scores.
    These factors are unique up to a rotation, which the scores do not see.
    """
    (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    root = s.sqrt()
    return (qb @ u) * root, (root[:, None] * vt) @ qa.mT


def scores(weight: Tensor, b: Tensor, a: Tensor, gb: Tensor, ga: Tensor) -> Gradient:
    """Return row and column sums of |G o M| and (G o M)^2 for M = weight + b a (m, n), in row blocks.

    G = gb a + b ga - gb ga estimates dL/dM from ga = dL/da (r, n) and gb = dL/db (m, r): it is how far a step of
    gradient descent on the factors would move their product. Products in the dtype of `weight`, sums in float64.
    """
    m, n = weight.shape
    rows, rows2 = torch.zeros(2, m, dtype=torch.float64)
    cols, cols2 = torch.zeros(2, n, dtype=torch.float64)
    step = a - ga
    for at in range(0, m, max(1, _BLOCK // n)):
        some = slice(at, at + max(1, _BLOCK // n))
        moved = torch.addmm(weight[some], b[some], a)
        product = (gb[some] @ step + b[some] @ ga) * moved
        size, square = product.abs().double(), product.double().square()
        rows[some], rows2[some] = size.sum(1).cpu(), square.sum(1).cpu()
        cols += size.sum(0).cpu()
        cols2 += square.sum(0).cpu()
    return Gradient(rows, cols, rows2, cols2)


@dataclass(frozen=True, eq=False)
class Site:
    """A layer with its adapter's balanced factors beside it, b (m, r) and a (r, n), scale inside, as leaves."""

    module: Any
    b: Tensor
    a: Tensor

    @property
    def weight(self) -> Tensor:
        """The base weight in logical orientation (m, n)."""
        w: Tensor = self.module.weight.detach()
        return w.T if type(self.module).__name__ == "Conv1D" else w

    def beside(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Add b a x to what the layer gave."""
        beside: Tensor = (args[0] @ self.a.mT) @ self.b.mT
        return out + beside


class Importance:
    """Moving averages of `scores` over batches, S <- 0.9 S + 0.1 I from 0, for layers with low-rank adapters.

    `factors`: parameter name -> (b, a) with the adapter's scale in them. Raises FormatError where they do not fit.
    """

    def __init__(self, layers: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.sites: dict[str, Site] = {}
        self.sums: dict[str, Gradient] = {}
        self.steps = self.skipped = 0
        for key, pair in factors.items():
            b, a = balanced(*pair)
            device = next(layers[key].parameters()).device
            site = Site(layers[key], *(t.to(device, torch.float32).requires_grad_(True) for t in (b, a)))
            m, n = site.weight.shape
            if (len(b), a.shape[-1]) != (m, n):
                raise FormatError(f"{key}: adapter is for shape {(len(b), a.shape[-1])}, the layer has {(m, n)}")
            self.sites[key] = site
            self.sums[key] = Gradient(*(torch.zeros(k, dtype=torch.float64) for k in (m, n, m, n)))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the model with the factors beside their layers until the end of the block."""
        hooks = [s.module.register_forward_hook(s.beside) for s in self.sites.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, loss: Tensor) -> None:
        """Take the gradients of one batch into the averages; a batch with one that is not finite is left out whole."""
        leaves = [t for s in self.sites.values() for t in (s.b, s.a)]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        if not bool(torch.isfinite(loss)) or not all(g is None or bool(torch.isfinite(g).all()) for g in grads):
            self.skipped += 1
            return
        self.steps += 1
        with torch.no_grad():
            for (key, site), gb, ga in zip(self.sites.items(), grads[::2], grads[1::2], strict=True):
                if gb is None or ga is None:
                    raise FormatError(f"{key}: the loss does not depend on this layer", hint="--exclude leaves it out")
                now = vars(scores(site.weight.float(), site.b, site.a, gb, ga))
                self.sums[key] = Gradient(**{n: KEEP * s + (1 - KEEP) * now[n]
                                             for n, s in vars(self.sums[key]).items()})
