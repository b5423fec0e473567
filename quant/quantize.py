"""Quantize: fewer bits for every delta, under one budget over the whole adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Step
from adaptc.coded import Coded
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import UsageError
from adaptc.factor import decoded
from adaptc.lowrank import low_rank
from adaptc.passes import Change, Context, Pass
from adaptc.quant.rd import Budget, Module, encode
from adaptc.quant.rd_code import RateDistortion


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Code every low-rank delta under one budget over all modules and singular directions (rate-distortion coding).

    One of `bits` (stored bits of index and payload a source parameter, r (m + n) of every module), `max_error` (total
    relative error of dW), or `size` (bytes of the whole file). The budget chooses ranks and bits together; the result
    decodes to ordinary low-rank factors. Errors reported are those of the decoded factors. Method and byte format:
    docs/rd-coding.md. Not for 3-D expert stacks and deltas without factors: they are left alone and named.
    """

    name: ClassVar[str] = "quantize"
    bits: float | None = None
    max_error: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        goals = [g for g in ("bits", "max_error", "size") if getattr(self, g) is not None]
        if len(goals) != 1:
            raise UsageError(f"quantize wants one of bits, max_error and size, got {' and '.join(goals) or 'none'}")
        if self.bits is not None and not (0 < self.bits <= 16 and math.isfinite(self.bits)):
            raise UsageError(f"bits is {self.bits}, must be above 0 and at most 16")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"max_error is {self.max_error}, must be between 0 and 1")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size is {self.size} bytes, must be positive")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` (or the direction of a DoRA) is one pair of 2-D factors."""
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        if isinstance(inner, LowRank):
            return decoded(inner.b).dim() == 2 and inner.rank > 0
        return isinstance(inner, Coded)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Any]:
        """Return the coded delta of every module: the budget is one, so the coding is too."""
        keys = self.selected(adapter)
        modules = {k: _module(adapter.deltas[k]) for k in keys}
        if not modules:
            return {}
        shapes = {k: _inner(adapter.deltas[k]).shape for k in keys}
        if self.size is not None:
            code = self._fit_size(adapter, modules, shapes, ctx)
        else:
            code = RateDistortion(encode(modules, Budget(bits_per_param=self.bits, max_error=self.max_error)))
        return {k: Coded(code, k, shapes[k]) for k in keys}

    def _fit_size(self, adapter: Adapter, modules: Mapping[str, Module], shapes: Mapping[str, tuple[int, ...]],
                  ctx: Context) -> RateDistortion:
        """Return the code that makes the whole file at most `size` bytes: coded for what the rest leaves over."""
        if ctx.size_of is None or self.size is None:
            raise UsageError("size needs a target format to count its headers")
        step = Step(str(self), _version(), adapter.nbytes, adapter.nbytes, 1.23457e-05)

        def file_size(code: RateDistortion) -> int:
            deltas = {k: _with_inner(d, Coded(code, k, shapes[k])) if k in shapes else d
                      for k, d in adapter.deltas.items()}
            return ctx.size_of(self.finish(adapter, adapter.with_deltas(deltas, step)))  # type: ignore[misc]

        empty = RateDistortion(encode(modules, Budget(nbytes=1)))
        over = file_size(empty) - empty.code.nbytes
        if over >= self.size:
            raise UsageError(f"size {self.size} bytes is below the smallest possible file, {over} bytes",
                             hint="headers and carried tensors (heads, norms) count")
        code = RateDistortion(encode(modules, Budget(nbytes=self.size - over)))
        while (excess := file_size(code) - self.size) > 0:
            code = code.prefix(code.code.nbytes - excess)
        return code

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return the planned code in place of the factors."""
        return Change(_with_inner(delta, setting))

    def finish(self, before: Adapter, after: Adapter) -> Adapter:
        """Return the adapter marked to be written as a container."""
        return replace(after, origin=replace(after.origin, container="adaptc"))


def _inner(delta: Delta) -> LowRank | Coded:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    assert isinstance(inner, (LowRank, Coded))
    return inner


def _with_inner(delta: Delta, inner: Coded) -> Delta:
    return replace(delta, inner=inner) if isinstance(delta, NeedsBase) else inner


def _module(delta: Delta) -> Module:
    """Return b, a and the multiplier as numpy arrays; a core is folded into b in float64."""
    factors = low_rank(_inner(delta))
    assert factors is not None
    b, a = decoded(factors.b), decoded(factors.a)
    if factors.core is not None:
        b = b.double() @ decoded(factors.core).double()
    return Module(_array(b), _array(a), factors.scale)


def _array(t: Tensor) -> npt.NDArray[np.floating[Any]]:
    """Return t as a numpy array: float64 as it is, anything narrower as float32."""
    array: npt.NDArray[np.floating[Any]] = (t if t.dtype == torch.float64 else t.float()).numpy()
    return array


def _version() -> str:
    from adaptc import __version__

    return __version__
