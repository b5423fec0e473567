"""Truncate: keep the best low-rank part of every delta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Step
from adaptc.base import Base
from adaptc.coded import Coded
from adaptc.delta import BaseFree, Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sum
from adaptc.errors import FormatError, UsageError
from adaptc.factor import decoded
from adaptc.lowrank import low_rank
from adaptc.measure import relative_error
from adaptc.passes import Change, Context, Pass, run
from adaptc.squeeze import budget, dora
from adaptc.squeeze.factored import Core, core_svd, truncate
from adaptc.squeeze.rsvd import core_rsvd, rsvd

Factors: TypeAlias = tuple[Tensor, Tensor, Tensor | None, float]
_ROUNDING = 1e-6  # max_error promises no more than fp32 factors can hold
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Setting:
    """What one module is truncated to, with the core if planning has computed it already.

    `fold`: a module that stays as it is gets the multiplier 1 all the same, as those have that are truncated.
    """

    rank: int | None
    core: Core | None
    device: str
    base: Base | None
    fold: bool = False


@dataclass(frozen=True, kw_only=True)
class Truncate(Pass):
    """Keep the best rank-k part of every low-rank, Kronecker, Hadamard or dense delta (Eckart-Young, from factors).

    One of `rank`, `energy` (per module, smallest k that keeps this share of ||dW||^2), `max_error` (per module, the
    smallest k with relative error below it), or `size` (bytes of the whole file, spent over all modules and directions
    by error removed per byte). None of them: ranks stay and only `dtype` changes. The result has scale 1, sqrt(sigma)
    on both factors. `method` "exact" is the SVD of the core; "rsvd" the randomised one of LoRA-Squeeze (arXiv
    2602.10993). `fit` "vllm" rounds ranks up to those vLLM has buffers for. Deltas that would not get smaller are left
    alone.
    """

    name: ClassVar[str] = "truncate"
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = field(default=None, metadata={"unit": "bytes"})
    method: str = "exact"
    oversample: int = 10
    power: int = 2
    seed: int = 0
    dtype: str | None = None
    fit: str | None = None

    def __post_init__(self) -> None:
        goals = [g for g in ("rank", "energy", "max_error", "size") if getattr(self, g) is not None]
        if len(goals) > 1:
            raise UsageError(f"{' and '.join(goals)} exclude each other")
        if not goals and self.dtype is None:
            raise UsageError("truncate has no goal", hint="one of rank, energy, max_error, size, or a dtype to cast to")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank is {self.rank}, must be a whole number from 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is {self.energy}, must be above 0 and at most 1")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise UsageError(f"max_error is {self.max_error}, must be from 0 to below 1")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size is {self.size} bytes, must be positive")
        choices = ((self.method, ("exact", "rsvd")), (self.dtype, (None, *DTYPES)), (self.fit, (None, "vllm")))
        for value, known in choices:
            if value not in known:
                raise UsageError(f"{value} is not one of {', '.join(str(k) for k in known if k)}")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` has factors to truncate, or is a dense matrix."""
        if isinstance(delta, NeedsBase):
            return delta.kind == "dora" and isinstance(delta.inner, LowRank)
        if isinstance(delta, (Dense, Sum)):
            return len(delta.shape) > 1
        return isinstance(delta, (LowRank, Kron, Hadamard, Coded))

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Setting]:
        """Return the rank of every module; spectra are only computed where the goal needs them."""
        keys = self.selected(adapter)

        def make(rank: int | None, core: Core | None = None) -> Setting:
            return Setting(rank, core, ctx.device, ctx.base)

        if self.energy is None and self.max_error is None and self.size is None:
            return self._served({k: make(self._fit(self.rank, adapter.deltas[k])) for k in keys}, adapter)
        cores = dict(zip(keys, run(lambda k: self._core(_factors(adapter.deltas[k], ctx.device), None), keys, ctx,
                                   "spectra"), strict=True))
        spectra = {k: _combined(c.s) for k, c in cores.items()}
        if self.size is not None:
            ranks = self._allocate(adapter, spectra, ctx)
        elif self.energy is not None:
            ranks = {k: budget.rank_for_energy(s, self.energy) for k, s in spectra.items()}
        else:
            ranks = {k: budget.rank_for_error(s, self.max_error or 0.0) for k, s in spectra.items()}
        return self._served({k: make(self._fit(ranks[k], adapter.deltas[k]), cores[k]) for k in keys}, adapter)

    def _served(self, settings: dict[str, Setting], adapter: Adapter) -> dict[str, Setting]:
        """Return settings after which all modules have one multiplier, where `fit` asks: vLLM reads no patterns."""
        held = {k: d for k, d in adapter.deltas.items() if isinstance(d, LowRank)}
        stays = all(k not in settings or _stays(d, settings[k]) for k, d in held.items())
        if self.fit is None or (stays and len({d.scale for d in held.values()}) < 2):
            return settings
        return {k: replace(s, fold=True) for k, s in settings.items()}

    def remarks(self, before: Adapter, after: Adapter) -> tuple[str, ...]:
        """Warn of multipliers that vLLM would not read: those of modules this pass was told to leave alone."""
        scales = sorted({d.scale for d in after.deltas.values() if isinstance(d, LowRank)})
        if self.fit is None or len(scales) < 2:
            return ()
        several = ", ".join(f"{s:g}" for s in scales[:4])
        return (f"vLLM reads one multiplier for all modules, this adapter has {several}",)

    def _fit(self, rank: int | None, delta: Delta) -> int | None:
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        if rank is None or self.fit is None or rank == 0 or not isinstance(inner, LowRank):
            return rank
        return budget.fit_up(rank, inner.rank)

    def _allocate(self, adapter: Adapter, spectra: Mapping[str, Tensor], ctx: Context) -> dict[str, int]:
        if ctx.size_of is None:
            raise UsageError("size needs a target format to count its headers")
        assert self.size is not None
        measure = ctx.size_of
        # The longest record this run can leave in the history; what is written in the end is never longer.
        step = Step(str(self), _version(), adapter.nbytes, adapter.nbytes, 1.23457e-05)

        def size_of(ranks: Mapping[str, int]) -> int:
            deltas = {k: self._skeleton(d, ranks[k]) if k in ranks else d for k, d in adapter.deltas.items()}
            return measure(adapter.with_deltas(deltas, step))

        cost = {k: _direction_bytes(adapter.deltas[k], self._dtype(adapter.deltas[k])) for k in spectra}
        floor = {k: int(isinstance(adapter.deltas[k], NeedsBase)) for k in spectra}
        return budget.allocate(spectra, cost, floor, size_of, self.size)

    def _skeleton(self, delta: Delta, rank: int) -> Delta:
        """Return the delta as it would be stored at `rank`, on the meta device; rank 0 leaves empty factors."""
        if isinstance(delta, NeedsBase):
            return replace(delta, inner=self._skeleton(delta.inner, rank))  # type: ignore[arg-type]
        (*batch, m), n = _rows(delta), math.prod(delta.shape) // math.prod(_rows(delta))
        dtype = self._dtype(delta)
        a = torch.empty(*batch, rank, n, dtype=dtype, device="meta")
        return LowRank(a, torch.empty(*batch, m, rank, dtype=dtype, device="meta"), None, 1.0, delta.shape)

    def _dtype(self, delta: Delta) -> torch.dtype:
        if self.dtype is not None:
            return DTYPES[self.dtype]
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        if isinstance(inner, LowRank):
            return inner.b.dtype if inner.b.dtype.itemsize < 8 else torch.float32
        side = inner.weight if isinstance(inner, Dense) else None
        return side.dtype if side is not None and side.dtype.itemsize < 8 else torch.float32

    def _core(self, factors: Factors, rank: int | None) -> Core:
        b, a, middle, scale = factors
        if self.method == "exact":
            return core_svd(b, a, middle, scale)
        return core_rsvd(b, a, middle, scale, rank or a.shape[-2], self.oversample, self.power, self.seed)

    def delta(self, key: str, delta: Delta, setting: Setting) -> Change:
        """Return `delta` at setting.rank, with the error of what is stored (casts included)."""
        if isinstance(delta, NeedsBase):
            return self._dora(key, delta, setting)
        if isinstance(delta, LowRank) and _stays(delta, setting):
            kept = self._cast(_folded(delta) if setting.fold else delta)
            if kept is delta:
                return Change(kept, 0.0)
            error = relative_error(delta, kept)
            self._refuse(error)
            return Change(kept, error, "multiplier folded into B" if setting.fold else "cast")
        if setting.rank is None:
            return Change(delta, 0.0, "only low-rank factors are cast")
        b, a, middle, scale = factors = _factors(delta, setting.device, setting.rank, self)
        core = setting.core or self._core(factors, setting.rank)
        k = min(setting.rank, core.s.shape[-1])
        made = truncate(b, a, k, middle=middle, scale=scale, dtype=self._dtype(delta), core=core)
        while not self._within(made.error) and k < core.s.shape[-1]:  # the cast cost more than the spectrum left over
            k = self._fit(k + 1, delta) or k + 1
            made = truncate(b, a, k, middle=middle, scale=scale, dtype=self._dtype(delta), core=core)
        self._refuse(made.error)
        after = LowRank(_storable(made.a), _storable(made.b), None, 1.0, delta.shape)
        error, energy = made.error, core.energy
        if setting.core is None and self.method == "rsvd" and low_rank(delta) is None:
            error, energy = _dense_error(delta, after)
        if not isinstance(delta, LowRank) and after.nbytes >= delta.nbytes:
            return Change(delta, 0.0, f"kept as it is: rank {k} factors would be larger", energy)
        return Change(after, error, "nothing of it is kept" if k == 0 and energy else "", energy)

    def _within(self, error: float) -> bool:
        return self.max_error is None or error <= self.max_error + _ROUNDING

    def _refuse(self, error: float) -> None:
        """Raise UsageError where a cast alone is past `max_error`."""
        if not self._within(error):
            raise UsageError(f"error {error:.3g} at full rank is above max_error {self.max_error:g}, the dtype is too "
                             f"narrow", hint="a wider --dtype, or a larger --max-error")

    def _dora(self, key: str, delta: NeedsBase, setting: Setting) -> Change:
        assert isinstance(delta.inner, LowRank)
        inner = self.delta(key, delta.inner, replace(setting, base=None))
        made = replace(delta, inner=inner.delta)  # type: ignore[arg-type]
        if inner.delta is delta.inner:
            return Change(delta, 0.0)
        if setting.base is None:
            return Change(made, inner.error, "magnitude kept, error is that of the direction")
        return dora.best_magnitude(delta, made, setting.base.weight(key, delta.shape))

    def _cast(self, delta: LowRank) -> LowRank:
        dtype = self._dtype(delta)
        a, b = decoded(delta.a), decoded(delta.b)
        if self.dtype is None or a.dtype == dtype == b.dtype:
            return delta
        return LowRank(_storable(a.to(dtype)), _storable(b.to(dtype)), None, delta.scale, delta.shape)


def _stays(delta: LowRank, setting: Setting) -> bool:
    """Return whether a module's rank is already low enough."""
    return (setting.rank is None or setting.rank >= delta.rank) and delta.core is None


def _folded(delta: LowRank) -> LowRank:
    """Return the same delta with multiplier 1, b rounded to its own dtype."""
    if delta.scale == 1.0:
        return delta
    b = decoded(delta.b)
    return LowRank(delta.a, _storable((b.double() * delta.scale).to(b.dtype)), None, 1.0, delta.shape)


def _version() -> str:
    from adaptc import __version__

    return __version__


def _rows(delta: BaseFree) -> tuple[int, ...]:
    """Return (experts..., out): the axes of b before its rank."""
    return tuple(delta.b.shape[:-1]) if isinstance(delta, LowRank) else delta.shape[:1]


def _direction_bytes(delta: Delta, dtype: torch.dtype) -> int:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    assert inner is not None
    *batch, m = _rows(inner)
    return math.prod(batch) * (m + math.prod(inner.shape) // (math.prod(batch) * m)) * dtype.itemsize


def _factors(delta: Delta, device: str, rank: int | None = None, how: Truncate | None = None) -> Factors:
    """Return (b, a, middle, scale) of any handled delta; a dense one by SVD, randomised if `how` says so."""
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    assert inner is not None
    factors = low_rank(inner)
    if factors is not None:
        middle = decoded(factors.core).to(device).double() if factors.core is not None else None
        return decoded(factors.b).to(device), decoded(factors.a).to(device), middle, factors.scale
    w = inner.dense().flatten(1).to(device)
    if how is not None and how.method == "rsvd" and rank is not None:
        u, s, vh = rsvd(w, rank, how.oversample, how.power, how.seed)
    else:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u * s, vh, None, 1.0


def _dense_error(delta: BaseFree, after: LowRank) -> tuple[float, float]:
    """Return (relative error, ||dW||_F^2) of a dense delta, with what its randomised SVD has not seen."""
    w = delta.dense()
    energy = float(w.square().sum())
    return (float((w - after.dense()).norm()) / energy**0.5 if energy else 0.0), energy


def _combined(s: Tensor) -> Tensor:
    """Return one descending spectrum for a batch of experts: the root of the summed squares, index by index."""
    return s if s.dim() == 1 else s.flatten(0, -2).square().sum(0).sqrt()


def _storable(t: Tensor) -> Tensor:
    """Return t on the CPU. Raises FormatError when the cast left the range of its dtype."""
    stored = t.cpu().contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(f"factor entries do not fit {str(t.dtype)[6:]}", hint="--dtype bf16 or fp32")
    return stored
