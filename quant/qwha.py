"""QWHA: quantise a base model and give it an adapter, sparse in a Walsh-Hadamard basis, that takes back the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.base import Base
from adaptc.calibration import SPLITS, Calibration, Split
from adaptc.delta import Delta, NeedsBase, Sparse, kind
from adaptc.errors import AdaptcError, NeedsError, UsageError
from adaptc.fingerprint import fingerprint_of, samples
from adaptc.passes import Change, Context, Need, Outcome, Pass, located, one_blas_thread, run
from adaptc.quant.golomb import Golomb
from adaptc.quant.gptq import error_feedback
from adaptc.quant.grid import Grid, grid_of, round_to_nearest
from adaptc.quant.qwha_fit import allocate, keep, sizes_of
from adaptc.quant.walsh import name_for, transform
from adaptc.report import Row, rank_of, total_error, untouched
from adaptc.spectral import Spectral

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHOICES = {"allocation": ("activation", "weight", "even"), "selection": ("energy", "coefficient"),
           "basis": ("walsh", "none"), "dtype": tuple(DTYPES)}
# Fewer calibration tokens than this for each coefficient of an average row, and refined values fit noise alone.
TOKENS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The adapter of one quantised weight, and how well it does.

    quantised: the weight's values in few bits, in the dtype and orientation (out, in, ...) of the base. energy and
    error: ||target||^2 and ||target - dw|| / ||target|| for target = W0 - WQ + the change it absorbs. outputs:
    ||(target - dw) X|| / ||target X|| on calibration tokens and on those held out, where there are some.
    """

    delta: Spectral | Sparse
    quantised: Tensor
    energy: float
    error: float
    outputs: Mapping[Split, float]


@dataclass(frozen=True, kw_only=True)
class QWHA(Pass):
    """Give every linear layer coefficients F with (WQ + F U) x near (W0 + dW) x, WQ being its quantised weight.

    `quant`: nf4, int2, int3, int4, int8 (ranges of `group` entries), or the folder of a quantised model; `gptq` feeds
    rounding errors back to the columns that follow. The budget is that of a LoRA of rank `rank_budget`, r (m + n)
    coefficients a layer, or a share `density` of its entries. AdaAlloc divides it over rows by their `allocation`
    error to the power `t`; `selection` keeps the largest |x0_ij| sqrt(G_jj) (energy) or |x0_ij| (coefficient); values
    are refined by least squares on the calibration inputs, their second moment damped by `damping` times its mean
    diagonal, unless `refine` is off. Of `rounds` > 1, each after the first adds coefficients where the error that is
    left is steepest, which the paper does not do. `basis` none keeps entries of the weight itself. Deltas the adapter
    already has are absorbed: the result runs on the quantised base alone and is wrong on any other. 2509.17428.

    The paper: activation, coefficient, rounds=1. Its code: weight, energy, rounds=1 (docs/qwha.md compares them).
    """

    name: ClassVar[str] = "qwha"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE, Need.CALIBRATION})
    container: ClassVar[str] = "adaptc"
    quant: str = "int4"
    rank_budget: int | None = None
    density: float | None = None
    group: int = 64
    gptq: bool = False
    allocation: str = "activation"
    selection: str = "energy"
    t: float = 1.0
    damping: float = 1e-4
    refine: bool = True
    rounds: int = 2
    basis: str = "walsh"
    dtype: str = "fp16"

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise UsageError(f"{option} {getattr(self, option)} is not one of {', '.join(known)}")
        if (self.rank_budget is None) == (self.density is None):
            raise UsageError("qwha wants one of rank_budget and density")
        if self.rank_budget is not None and self.rank_budget < 1:
            raise UsageError(f"rank budget is {self.rank_budget}, must be at least 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density}, must be above 0 and at most 1")
        if not (0 <= self.t <= 8 and 0 < self.damping <= 1):
            raise UsageError(f"t is {self.t} and damping {self.damping}, they go from 0 to 8 and from above 0 to 1")
        if not 1 <= self.rounds <= 64:
            raise UsageError(f"rounds is {self.rounds}, must be from 1 to 64")
        if not self.refine and self.rounds > 1:
            raise UsageError(f"{self.rounds} rounds refine values after each, and refine is off", hint="rounds=1")
        if not Path(self.quant).is_dir():
            grid_of(self.quant, self.group)
        elif self.gptq:
            raise UsageError(f"{self.quant} is quantised already, gptq does not apply")

    def handles(self, delta: Delta) -> bool:
        """Whether the delta belongs to a matrix."""
        return len(delta.shape) == 2

    def plan(self, adapter: Adapter, ctx: Context) -> dict[str, Fitter]:
        """Return what fits a layer, for all of them."""
        fitter = self.fitter(ctx)
        return dict.fromkeys(self.selected(adapter), fitter)

    def delta(self, key: str, delta: Delta, setting: Fitter) -> Change:
        """Return the adapter of one layer."""
        made = setting(key, delta)
        return Change(made.delta, made.error, energy=made.energy)

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Outcome:
        """Run on every matrix of an adapter; the result carries the fingerprint of the quantised base."""
        return self.measured(adapter, ctx or Context())[0]

    def fitter(self, ctx: Context) -> Fitter:
        """Return what fits a layer of the base and calibration in `ctx`."""
        assert isinstance(ctx.base, Base)
        assert isinstance(ctx.calibration, Calibration)
        folder = Path(self.quant)
        grid: Grid | Base = Base(folder) if folder.is_dir() else grid_of(self.quant, self.group)
        return Fitter(self, ctx.base, ctx.calibration, grid)

    def measured(self, adapter: Adapter, ctx: Context, sink: Callable[[str, Tensor], None] | None = None
                 ) -> tuple[Outcome, dict[str, Fitted]]:
        """Run the pass and return with the outcome every layer's `outputs`; `sink` is given the quantised weights.

        The adapter carries the fingerprint of the quantised base. Raises AdaptcError naming the layer that failed.
        """
        found: dict[str, Fitted] = {}
        sampled: dict[str, bytes] = {}

        def one(key: str) -> tuple[Delta, Row]:
            before = adapter.deltas[key]
            why = self.skips(key, before)
            if not why and fitter.calibration.moment(key) is None:
                why = "the calibration has no statistics of its inputs"
            if why:
                return before, untouched(key, before, why)
            made = fitter(key, before)
            if sink is not None:
                sink(key, made.quantised)
            sampled[key] = samples(made.quantised)
            found[key] = replace(made, quantised=torch.empty(0))
            row = Row(key, kind(before), rank_of(before), None, before.nbytes, made.delta.nbytes, made.error,
                      made.energy)
            return made.delta, row

        for need in sorted(self.needs, key=lambda n: n.value):
            if not ctx.has(need):
                raise NeedsError(f"{self.name} needs {need.value}", hint=f"pass --{need.value}")
        try:
            self.selected(adapter)
            fitter = self.fitter(ctx)
            with one_blas_thread():
                made = run(one, list(adapter.deltas), ctx, self.name)
        except AdaptcError as e:
            raise located(e, f"{self.name}: {e}") from e
        if not found:
            raise NeedsError(f"{self.name}: {fitter.calibration.path.name} has statistics of none of "
                             f"{len(adapter.deltas)} layers", hint="adaptc calibrate --base with the same model")
        rows = tuple(row for _, row in made)
        quantizer = fitter.quantizer
        whole = len(sampled) == len(adapter.deltas)
        origin = replace(adapter.origin, fingerprint=fingerprint_of(sampled) if whole else None,
                         notes=(*adapter.origin.notes, f"made for its base quantised by {quantizer}"))
        after = replace(adapter, deltas={row.key: delta for delta, row in made}, origin=origin)
        step = Step(str(self), __version__, adapter.nbytes, after.nbytes, total_error(rows))
        return Outcome(after.with_deltas(after.deltas, step), rows), {k: found[k] for k in adapter.deltas if k in found}


@dataclass(frozen=True, eq=False)
class Fitter:
    """Fits the adapter of one layer at a time; calling it changes nothing, so layers run in parallel."""

    options: QWHA
    base: Base
    calibration: Calibration
    grid: Grid | Base

    @property
    def quantizer(self) -> str:
        """The name of the quantizer, or of the quantised model."""
        if isinstance(self.grid, Base):
            return f"the model {self.grid.path.resolve().name}"
        return f"{'gptq ' if self.options.gptq else ''}{self.grid.name}"

    def __call__(self, key: str, delta: Delta) -> Fitted:
        """Quantise parameter `key`, add what `delta` changes, and fit the coefficients."""
        o, (m, n) = self.options, delta.shape
        w0 = self.base.weight(key, delta.shape)
        gram = self.calibration.gram(key, n)
        budget = self._budget(key, m, n)
        wq = self._quantised(key, w0, gram)
        target = w0.double() - wq.double()
        if delta.nbytes:
            target += (delta.resolve(w0) if isinstance(delta, NeedsBase) else delta).dense()
        name = name_for(n) if o.basis == "walsh" else "block:1"
        u = transform(name, n)
        x0 = u.forward(target)
        damped = u.both_sides(torch.diag(gram) if gram.dim() == 1 else gram)
        mean = float(damped.diagonal().mean())
        if not mean > 0:
            raise NeedsError(f"{key}: calibration inputs are all zero")
        damped.diagonal().add_(o.damping * mean)
        through = x0 @ damped
        counts = allocate(sizes_of(x0, through, o.allocation), budget if bool(target.any()) else 0, n, o.t)  # type: ignore[arg-type]
        at, values = keep(x0, damped, counts, o.selection, through if o.refine else None, o.rounds)  # type: ignore[arg-type]
        del x0, damped, through
        stored, scale = rounded(values, DTYPES[o.dtype])
        indices = Golomb.encode(at, m * n, n)
        made: Spectral | Sparse
        made = Spectral(indices, stored, name, scale, (m, n)) if o.basis == "walsh" else Sparse(indices, stored, scale,
                                                                                                (m, n))
        left, energy = target - made.dense(), float(target.square().sum())
        error = math.sqrt(float(left.square().sum()) / energy) if energy else 0.0
        return Fitted(made, wq, energy, error, self._outputs(key, target, left))

    def _budget(self, key: str, m: int, n: int) -> int:
        o = self.options
        budget = round(o.density * m * n) if o.density is not None else (o.rank_budget or 0) * (m + n)
        if not 0 < budget <= m * n:
            raise UsageError(f"{key}: a budget of {budget} coefficients does not fit {m} x {n}",
                             hint=f"at most --rank-budget {m * n // (m + n)}")
        seen, least = self.calibration.tokens("train", key), TOKENS * math.ceil(budget / m)
        if o.refine and seen is not None and seen < least:
            raise NeedsError(f"{key}: calibration saw {seen} tokens, {math.ceil(budget / m)} coefficients a row want "
                             f"at least {least}", hint="adaptc calibrate on more text, or take a smaller budget")
        return budget

    def _quantised(self, key: str, w0: Tensor, gram: Tensor) -> Tensor:
        """Return the quantised weight, rounded to the dtype of the base, which is what a model folder can hold."""
        if isinstance(self.grid, Base):
            return self.grid.weight(key, tuple(w0.shape))
        values = error_feedback(w0, gram, self.grid) if self.options.gptq else round_to_nearest(w0, self.grid)
        return values.to(w0.dtype)

    def _outputs(self, key: str, target: Tensor, left: Tensor) -> dict[Split, float]:
        out: dict[Split, float] = {}
        for split in SPLITS:
            if split == "train" or self.calibration.moment(key, split) is not None:
                total = self.calibration.energy(key, target, split)
                out[split] = math.sqrt(self.calibration.energy(key, left, split) / total) if total else 0.0
        return out


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return values / scale in `dtype` and the scale, a power of two that puts the largest between 1/2 and 1."""
    top = float(values.abs().max()) if values.numel() else 0.0
    scale = 2.0 ** math.frexp(top)[1] if top else 1.0
    return (values / scale).to(dtype), scale
