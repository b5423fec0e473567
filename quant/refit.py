"""Fit the gains of a coded adapter to what the model says: label-free calibration at no cost in bytes.

The gains of all kept directions, a few hundred numbers, are moved to minimise KL(reference || coded) of the output
distributions on calibration batches. Codes stay as they are; only mantissas and exponents in the index change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptc.quant.rd import RDCode, decode, scale_gains


class _Deltas:
    """Adds b (g * (a x)) to the outputs of layers, for factors that can be swapped."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.handles = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            b, a, gain = self.factors[name]
            hidden = args[0] @ a.mT
            sum_: Tensor = out + (hidden if gain is None else hidden * gain) @ b.mT
            return sum_

        return add

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def refit_gains(
    run: Callable[[Any], Tensor],
    layers: Mapping[str, nn.Module],
    reference: Mapping[str, tuple[Tensor, Tensor]],
    code: RDCode,
    batches: Sequence[Any],
    *,
    epochs: int = 2,
    rate: float = 0.02,
    seed: int = 0,
) -> RDCode:
    """Return `code` with gains that minimise the KL divergence of the model's outputs from those of `reference`.

    `run(batch)` gives logits (..., classes) of the plain base model; `layers` are its modules by the names of `code`,
    called with inputs (..., n); `reference` the uncoded factors b (m, r), a (r, n), scale included. Adam on log gains
    with a cosine schedule from `rate`; the order of batches is the only randomness, from `seed`. Needs no labels. Not
    for a handful of tokens: there are as many unknowns as directions.
    """
    deltas = _Deltas(layers)
    coded = {
        name: (torch.from_numpy(np.ascontiguousarray(b)), torch.from_numpy(a)) for name, (b, a) in decode(code).items()
    }
    logs = {name: torch.zeros(len(a), requires_grad=True) for name, (_, a) in coded.items()}
    optimizer = torch.optim.Adam([log for log in logs.values() if log.numel()], lr=rate, betas=(0.9, 0.98))
    order = torch.Generator().manual_seed(seed)
    steps, step = epochs * len(batches), 0
    try:
        for _ in range(epochs):
            for i in torch.randperm(len(batches), generator=order).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 5) * (1 + math.cos(math.pi * step / steps)) / 2
                with torch.no_grad():
                    deltas.factors = {name: (b, a, None) for name, (b, a) in reference.items()}
                    target = run(batches[i]).log_softmax(-1)
                deltas.factors = {name: (b, a, logs[name].exp()) for name, (b, a) in coded.items()}
                found = run(batches[i]).log_softmax(-1)
                loss = (target.exp() * (target - found)).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
    finally:
        deltas.remove()
    return scale_gains(code, {name: log.detach().exp().numpy() for name, log in logs.items()})
