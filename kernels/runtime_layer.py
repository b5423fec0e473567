"""The forward of one adapted layer: the base by the kernel that reads it, the active adapters fused or beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, UsageError
from adaptc.kernels import dora
from adaptc.kernels.device import backend
from adaptc.kernels.linear import linear
from adaptc.kernels.runtime_branch import Branch, Low, free
from adaptc.kernels.runtime_match import Site
from adaptc.kernels.weight import Weight


@dataclass(frozen=True, eq=False)
class Selection:
    """What runs: `active` adapters, each with a multiplier, on every row; or `groups` of rows, for `rows` ids."""

    active: tuple[tuple[str, float], ...] = ()
    groups: tuple[tuple[str, float, Tensor], ...] | None = None
    rows: int = 0


Term = tuple[tuple[Branch, ...], float, "Tensor | None"]  # branches, multiplier, gain of DoRA


class Layer:
    """Takes the place of one module's forward; `own` is the forward that it replaces."""

    def __init__(self, site: Site, runtime: Any) -> None:
        self.site, self.runtime, self.module = site, runtime, site.module
        self.own: Callable[[Tensor], Tensor] = site.module.forward
        self.branches: dict[str, tuple[Branch, ...]] = {}
        self.gains: dict[str, Tensor] = {}
        self.coded: Weight | None = None  # of bitsandbytes: its scales are codes too, decoded once
        self.device: torch.device | None = None
        self.hidden: Any = None  # a forward of the module's own instance, as other tools put there

    def __call__(self, input: Tensor) -> Tensor:
        """Return the layer's output with the selected adapters."""
        if self.device != input.device:
            self._move(input.device)
        selection: Selection = self.runtime.selection
        try:
            if selection.groups is not None:
                return self._mixed(input, selection)
            return self._uniform(input, [(self.branches[name], scale, self.gains.get(name))
                                         for name, scale in selection.active if name in self.branches])
        except AdaptcError as e:
            if not str(e).startswith(self.site.name):
                raise type(e)(f"{self.site.name}: {e}", hint=e.hint) from e
            raise

    def weight(self, x: Tensor) -> Weight | None:
        """Return the weight where a kernel of ours multiplies by it, None where the module's own forward does.

        Codes always; floats where the adapter is fused into the product (GPU) or the specification is asked for.
        """
        if self.site.kind == "packed":
            return self.site.weight()
        if self.site.kind == "bnb4":
            if self.coded is None or self.coded.data.device != x.device:
                self.coded = self.site.weight()
            return self.coded
        if self.site.kind != "linear":
            return None
        if torch.compiler.is_compiling():
            return self.site.weight() if x.is_cuda else None
        fused = backend(x) == "triton" or os.environ.get("ADAPTC_KERNELS") == "naive"
        trained = self.module.weight.requires_grad and torch.is_grad_enabled()  # the kernels have no gradient for it
        return self.site.weight() if fused and not trained else None

    def _uniform(self, x: Tensor, terms: list[Term]) -> Tensor:
        """Run the same adapters on every row."""
        if not terms and self.site.kind != "bnb4":
            return self.own(x)
        weight = self.weight(x)
        if weight is not None and len(terms) == 1:
            branches, scale, gain = terms[0]
            low = branches[0] if len(branches) == 1 and (gain is None or scale == 1.0) else None
            if isinstance(low, Low) and len(low.parts) == 1:
                return linear(x, weight, low.parts[0], low.scale * scale, self._bias(), gain)
        return self._add(x, self._base(x, weight), terms)

    def _base(self, x: Tensor, weight: Weight | None) -> Tensor:
        return self.own(x) if weight is None else linear(x, weight, bias=self._bias())

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def _add(self, x: Tensor, y: Tensor, terms: list[Term]) -> Tensor:
        """Return y plus every term; y may be overwritten."""
        gained = [t for t in terms if t[2] is not None]
        base = y.clone() if gained and len(terms) > 1 and free(x, y) else y
        for branches, scale, gain in terms:
            if gain is not None:
                continue
            for branch in branches:
                y = branch.add(x, y, scale)
        for branches, scale, gain in gained:
            assert gain is not None
            y = self._dora(x, y, base, branches, scale, gain, alone=len(terms) == 1)
        return y

    def _dora(self, x: Tensor, y: Tensor, base: Tensor, branches: tuple[Branch, ...], scale: float, gain: Tensor,
              alone: bool) -> Tensor:
        """y + scale * (W' - W0) x with W' x = gain * (W0 x + dW x)."""
        dw = torch.zeros_like(y)
        for branch in branches:
            dw = branch.add(x, dw, 1.0)
        bias = self._bias()
        if alone and scale == 1.0 and free(x, y):
            m = y.shape[-1]
            return dora.compose(y.reshape(-1, m), dw.reshape(-1, m), gain, bias, 1.0).view(y.shape)
        plain = base.float() if bias is None else base.float() - bias.float()
        return (y.float() + scale * (gain * (plain + dw.float()) - plain)).to(y.dtype)

    def _mixed(self, x: Tensor, selection: Selection) -> Tensor:
        """Run each row of the batch with its own adapter."""
        if x.shape[0] != selection.rows:
            raise UsageError(f"input has {x.shape[0]} rows, adapters are set for {selection.rows}")
        assert selection.groups is not None
        mine = [g for g in selection.groups if g[0] in self.branches]
        weight = self.weight(x)
        if weight is not None and mine and free(x, x) and backend(x) == "triton":
            paged = self.runtime.paged(self, mine, x)
            if paged is not None:
                from adaptc.kernels.batch import linear_many

                flat = x.reshape(-1, x.shape[-1])
                y = linear_many(flat, weight, paged[0], paged[1], self._bias())
                return y.view(*x.shape[:-1], weight.shape[0])
        y = self._base(x, weight)
        for name, scale, rows in mine:
            rows = rows.to(x.device)
            part = self._add(x[rows], y[rows], [(self.branches[name], scale, self.gains.get(name))])
            y = y.index_copy_(0, rows, part) if free(x, y) else y.index_copy(0, rows, part)
        return y

    def _move(self, device: torch.device) -> None:
        """Bring everything to the device of the input."""
        for branches in self.branches.values():
            for branch in branches:
                branch.move(device)
        self.gains = {name: gain.to(device) for name, gain in self.gains.items()}
        self.device = device


__all__ = ["Layer", "Selection", "Term"]
