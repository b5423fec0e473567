"""Second moments of what the linear layers of a running model receive."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import FormatError, UnsupportedError

# How many inputs back a layer may have the same one: parallel blocks feed q, k, v, the attention's output, then fc1.
_RECENT = 8


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that multiply by a matrix, by the name of its parameter: nn.Linear and transformers' Conv1D."""
    return {f"{name}.weight": m for name, m in model.named_modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


class Moments:
    """Running sums of x x^T (n, n), or of x^2 (n,) with `diagonal`, over the tokens that layers receive.

    Sums are float64: products of two float32 are exact in it, so the sum over any number of tokens is right to 1e-15 of
    its largest term, whatever the batches were; in float32 the outlier channels of a transformer would round away
    what the quiet ones say. Layers that are given the very same tensor (q, k and v; gate and up) share one sum:
    `leaders` says whose. `counts` are rows summed; `sums` and `counts` are by leader.
    """

    def __init__(self, layers: Mapping[str, nn.Module], diagonal: bool) -> None:
        self.layers, self.diagonal = layers, diagonal
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.leaders: dict[str, str] = {}
        self._mask = torch.ones(0, dtype=torch.bool)
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=_RECENT)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect from every forward until the end of the block."""
        hooks = [m.register_forward_pre_hook(partial(self._see, name)) for name, m in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def batch(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens (k, longest) of the forward in this block are text and not padding."""
        self._mask = mask
        try:
            yield
        finally:
            self._recent.clear()

    def mean(self, layer: str) -> Tensor:
        """Return E[x x^T] or E[x^2] of a leader in float64."""
        return self.sums[layer] / max(self.counts[layer], 1)

    def clear(self) -> None:
        """Begin again for other text; who shares with whom stays."""
        self.sums, self.counts = {}, {}

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise UnsupportedError(f"{name}: the layer is called without a tensor to watch")
        # Identity tells the same tensor from another at the same address; the deque keeps it alive meanwhile.
        given = args[0]
        leader = next((who for x, who in self._recent if x is given), name)
        if self.leaders.setdefault(name, leader) != leader:
            raise UnsupportedError(f"{name}: shares its input with {self.leaders[name]} in some batches and not in all",
                                   hint="--exclude leaves a layer out")
        if leader != name:
            return
        self._recent.append((given, name))
        x = self._rows(given.detach()).double()
        if not bool(torch.isfinite(x).all()):
            raise FormatError(f"{name}: the model makes inputs that are not finite")
        n = x.shape[-1]
        if name not in self.sums:
            shape = (n,) if self.diagonal else (n, n)
            self.sums[name], self.counts[name] = torch.zeros(shape, dtype=torch.float64, device=x.device), 0
        if self.diagonal:
            self.sums[name] += x.square().sum(0)
        else:
            self.sums[name].addmm_(x.T, x)
        self.counts[name] += len(x)

    def _rows(self, x: Tensor) -> Tensor:
        """Return inputs as (tokens, n) without padding; those that are not a row a token (pooled ones) whole."""
        mask = self._mask.to(x.device)
        if x.shape[:-1] == mask.shape:
            return x[mask]
        if x.dim() == 2 and len(x) == mask.numel():
            return x[mask.flatten()]
        return x.reshape(-1, x.shape[-1])
