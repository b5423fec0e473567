"""Quantize: fewer bits for every delta, under one budget over the whole adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Step
from adaptc.calibration import Calibration
from adaptc.coded import Coded
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import UsageError
from adaptc.factor import Encoded, decoded
from adaptc.lowrank import low_rank
from adaptc.passes import Change, Context, Pass
from adaptc.quant.baseline import sign_mean, truncation_nf4
from adaptc.quant.rd import Budget, Module, encode
from adaptc.quant.rd_code import RateDistortion
from adaptc.quant.weighted import module_weights, output_error
from adaptc.registry import CODECS

# Codecs of single factors, with the bit widths they have ("nf4" and "fp8" have one).
WIDTHS: dict[str, tuple[int, ...]] = {"affine": (2, 3, 4, 8), "nf4": (4,), "fp8": (8,), "bilora": (1, 2, 4, 8)}
METHODS = ("rd", *WIDTHS)


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store every low-rank delta in few bits.

    `method` "rd" (the default) is rate-distortion coding of all modules and singular directions under one budget, which
    chooses ranks and bits together (docs/rd-coding.md): one of `bits` (stored bits of index and payload a source
    parameter, r (m + n) of every module; fractions are natural), `max_error` (total relative error of dW), or `size`
    (bytes of the whole file). "affine", "nf4", "fp8" and "bilora" code each factor as it is, `bits` being the width of
    a code and `group` the values that share an affine scale; they are for consumers that want such codes, not for
    budgets. Either way the result decodes to ordinary low-rank factors, and errors are those of the decoded factors.
    With calibration statistics in the context, modules are also weighted by what their error costs at the outputs, and
    the code with the smaller output error is kept. 3-D expert stacks and deltas without factors are left alone and
    named.
    """

    name: ClassVar[str] = "quantize"
    container: ClassVar[str] = "adaptc"
    bits: float | None = None
    max_error: float | None = None
    size: int | None = field(default=None, metadata={"unit": "bytes"})
    method: str = "rd"
    group: int = 64

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method {self.method} is not one of {', '.join(METHODS)}")
        if self.method in WIDTHS:
            self._check_width()
            return
        goals = [g for g in ("bits", "max_error", "size") if getattr(self, g) is not None]
        if len(goals) != 1:
            raise UsageError(f"quantize wants one of bits, max_error and size, got {' and '.join(goals) or 'none'}")
        if self.bits is not None and not (0 < self.bits <= 16 and math.isfinite(self.bits)):
            raise UsageError(f"bits is {self.bits}, must be above 0 and at most 16")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"max_error is {self.max_error}, must be between 0 and 1")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size is {self.size} bytes, must be positive")

    def _check_width(self) -> None:
        widths = WIDTHS[self.method]
        if self.max_error is not None or self.size is not None:
            raise UsageError(f"{self.method} has fixed widths and takes no max_error or size", hint="method rd does")
        if self.bits not in widths and not (self.bits is None and len(widths) == 1):
            raise UsageError(f"{self.method} has {' or '.join(map(str, widths))} bits, not {self.bits}")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` (or the direction of a DoRA) is one pair of 2-D factors."""
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        if isinstance(inner, LowRank):
            return len(inner.b.shape) == 2 and inner.rank > 0
        return isinstance(inner, Coded)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Any]:
        """Return the coded delta of every module; with one budget, the coding is one too."""
        keys = self.selected(adapter)
        if self.method in WIDTHS or not keys:
            return dict.fromkeys(keys)
        modules = {k: _module(adapter.deltas[k]) for k in keys}
        code, note = self._coded(adapter, modules, ctx, None), ""
        if isinstance(ctx.calibration, Calibration):
            weighted = self._coded(adapter, modules, ctx, module_weights(modules, ctx.calibration))
            errors = [output_error(modules, c, ctx.calibration) for c in (code, weighted)]
            note = (f"output error on the calibration inputs {errors[0]:.3g} when coded for dW, {errors[1]:.3g} when "
                    f"coded for outputs: the better was kept")
            code = weighted if errors[1] < errors[0] else code
            if all(ctx.calibration.moment(k, "held") is not None for k in modules):
                note += f", {output_error(modules, code, ctx.calibration, 'held'):.3g} on held-out inputs"
        return {k: Change(_with_inner(adapter.deltas[k], Coded(code, k, _inner(adapter.deltas[k]).shape)), note=note)
                for k in keys}

    def _coded(self, adapter: Adapter, modules: Mapping[str, Module], ctx: Context, weights: Mapping[str, float] | None
               ) -> RateDistortion:
        """Return the code within the budget, with modules weighted in the distortion."""
        if self.size is not None:
            return self._fit_size(adapter, modules, ctx, weights)
        budget = Budget(bits_per_param=self.bits, max_error=self.max_error)
        return RateDistortion(encode(modules, budget, weights))

    def _fit_size(self, adapter: Adapter, modules: Mapping[str, Module], ctx: Context,
                  weights: Mapping[str, float] | None) -> RateDistortion:
        """Return the code that makes the whole file at most `size` bytes: coded for what the rest leaves over."""
        if ctx.size_of is None or self.size is None:
            raise UsageError("size needs a target format to count its headers")
        measure = ctx.size_of
        step = Step(str(self), _version(), adapter.nbytes, adapter.nbytes, 1.23457e-05)

        def file_size(code: RateDistortion) -> int:
            deltas = {k: _with_inner(d, Coded(code, k, _inner(d).shape)) if k in modules else d
                      for k, d in adapter.deltas.items()}
            return measure(self.finish(adapter, adapter.with_deltas(deltas, step)))

        empty = RateDistortion(encode(modules, Budget(nbytes=1)))
        over = file_size(empty) - empty.code.nbytes
        if over >= self.size:
            raise UsageError(f"size {self.size} bytes is below the smallest possible file, {over} bytes",
                             hint="headers and carried tensors (heads, norms) count")
        code = RateDistortion(encode(modules, Budget(nbytes=self.size - over), weights))
        while (excess := file_size(code) - self.size) > 0:
            code = code.prefix(code.code.nbytes - excess)
        return code

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return the planned code in place of the factors, or each factor through its codec."""
        if isinstance(setting, Change):
            return setting
        factors = low_rank(_inner(delta))
        assert factors is not None
        b, a = decoded(factors.b), decoded(factors.a)
        core = decoded(factors.core) if factors.core is not None else None
        made = LowRank(self._encode(a), self._encode(b), core, factors.scale, factors.shape)
        return Change(_with_inner(delta, made))

    def _encode(self, factor: Tensor) -> Encoded:
        config: dict[str, Any] = {}
        if len(WIDTHS[self.method]) > 1:
            config["width"] = int(self.bits or 0)
        if self.method == "affine":
            config["group"] = self.group
        made: Encoded = CODECS.get(self.method).encode(factor, **config)
        return made

    def remarks(self, before: Adapter, after: Adapter) -> tuple[str, ...]:
        """Return what the trivial schemes make of the same deltas: truncation + NF4 at the same bytes, sign * mean."""
        done = [k for k, d in before.deltas.items() if d is not after.deltas[k]]
        factors = {k: (torch.from_numpy(m.b), torch.from_numpy(m.a), m.scale)
                   for k, m in ((k, _module(before.deltas[k])) for k in done)}
        if not factors:
            return ()
        spent, params = stored_nbytes(after, done), sum(b.numel() + a.numel() for b, a, _ in factors.values())
        nf4, naive = truncation_nf4(factors, spent), sign_mean(factors)
        return (f"{8 * spent / params:.3g} bits a source parameter in {spent:,} bytes of codes; at the same bytes "
                f"optimal truncation + NF4 has error {nf4.error:.3g}",
                f"plain sign x mean would take {naive.nbytes:,} bytes and have error {naive.error:.3g}")


def stored_nbytes(adapter: Adapter, keys: list[str]) -> int:
    """Return the bytes that the deltas `keys` take in a container: codes with scales, and the index of joint codes."""
    inner = [d.inner if isinstance(d, NeedsBase) else d for d in (adapter.deltas[k] for k in keys)]
    joint = {id(d.code): d.code for d in inner if isinstance(d, Coded)}
    return sum(s.numel() for c in joint.values() for s in c.streams.values()) + \
        sum(d.nbytes for d in inner if d is not None and not isinstance(d, Coded))


def _inner(delta: Delta) -> LowRank | Coded:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    assert isinstance(inner, (LowRank, Coded))
    return inner


def _with_inner(delta: Delta, inner: LowRank | Coded) -> Delta:
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
