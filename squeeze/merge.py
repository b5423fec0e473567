"""Merge: several adapters of one base model into one, by any method, in the joint core of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.delta import BaseFree, Delta, Dense, NeedsBase, Sparse, kind
from adaptc.errors import NeedsError, UnsupportedError, UsageError
from adaptc.measure import norm2, relative_error
from adaptc.passes import Context, Join, Outcome, one_blas_thread, run
from adaptc.registry import nearest
from adaptc.report import Row, rank_of
from adaptc.squeeze.align import Aligned, align, carry
from adaptc.squeeze.factored import truncate
from adaptc.squeeze.joint import Part, absent, part
from adaptc.squeeze.merged import beside, joined_origin, stored, union, weighted_sum
from adaptc.squeeze.method import MERGES, InCore, Method, Options, Task
from adaptc.squeeze.truncate import DTYPES, Truncate

if TYPE_CHECKING:
    from adaptc.base import Base


@dataclass(frozen=True, kw_only=True)
class Merge(Join):
    """Join adapters of one base model into one.

    `weights`: one an input, default 1/T; they are used as they are by methods that add, by their ratio by methods that
    average (in factor space as they are, as in PEFT). `rank`: of every parameter, default the largest rank among the
    inputs there (lossless methods: as large as needed). `size`: bytes of the file, spent over all parameters by error
    removed per byte, instead of a rank. `scale` multiplies the result. `heads`: what to do with replaced tensors that
    differ. Rows measure ||dW - sum w dW_t|| / ||sum w dW_t|| of what is stored, whatever the method. Inputs that need
    the base (DoRA) are resolved against it first. Raises UsageError for options that make no sense, FormatError for
    inputs that do not fit each other.
    """

    name: ClassVar[str] = "merge"
    method: str = "exact"
    weights: tuple[float | int, ...] | None = None
    rank: int | None = None
    size: int | None = field(default=None, metadata={"unit": "bytes"})
    density: float | None = None
    seed: int = 0
    space: str = "core"
    gauge: str = "balanced"
    reweight: str = "both"
    scale: float = 1.0
    dtype: str | None = None
    heads: str | None = None
    any_base: bool = False
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        how = self.how
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank is {self.rank}, must be a whole number from 1")
        if self.rank is not None and self.size is not None:
            raise UsageError("rank and size exclude each other")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size is {self.size} bytes, must be positive")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density}, must be above 0 and at most 1")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(f"scale is {self.scale}, must be a number other than 0")
        for option in fields(Options):
            if getattr(self, option.name) != _DEFAULTS[option.name] and option.name not in how.options:
                raise UsageError(f"method {how.name} has no {option.name}",
                                 hint=f"it reads {', '.join(sorted(how.options)) or 'weights and rank only'}")
        for choice, known in _CHOICES.items():
            if getattr(self, choice) not in known:
                raise UsageError(f"{choice} is {getattr(self, choice)}, must be one of "
                                 f"{', '.join(str(k) for k in known if k)}")
        for w in self.weights or ():
            if not isinstance(w, (int, float)) or not math.isfinite(w) or (w < 0 and how.positive):
                raise UsageError(f"weight {w} makes no sense for {how.name}")
        if self.weights is not None and not any(self.weights):
            raise UsageError("every weight is 0")

    @property
    def how(self) -> Method:
        """The method."""
        return MERGES.get(self.method)

    def __call__(self, adapters: Sequence[Adapter], ctx: Context | None = None) -> Outcome:
        """Return the merged adapter with a row a parameter and notes on what did not fit."""
        ctx = ctx or Context()
        if len(adapters) < 2:
            raise UsageError(f"merge takes two adapters or more, got {len(adapters)}")
        names = self.names or tuple(f"input {i}" for i in range(1, len(adapters) + 1))
        for what, given in (("weight", self.weights), ("name", self.names or None)):
            if given is not None and len(given) != len(adapters):
                raise UsageError(f"{len(given)} {what}{'s' * (len(given) != 1)} for {len(adapters)} adapters")
        aligned = align(adapters, names, self.any_base)
        replaced, notes = carry(adapters, names, self.heads)
        with one_blas_thread():
            made = run(lambda k: self._parameter(k, aligned, names, ctx), list(aligned.deltas), ctx, self.name)
        rows, notes = tuple(r for _, r in made), (*aligned.notes, *notes)
        extra, left_out = beside(adapters)
        if left_out:
            notes = (*notes, f"{left_out} tensors that change no weight left out (training state, or they differ)")
        origin = joined_origin(adapters, list(aligned.deltas), replaced)
        history = tuple(s for a in adapters for s in a.history)
        out = Adapter({r.key: d for d, r in made}, replaced, origin, history, extra)
        outcome = Outcome(out, rows, notes)
        step = Step(str(self), __version__, sum(a.nbytes for a in adapters), out.nbytes, outcome.error)
        outcome = replace(outcome, adapter=out.with_deltas(out.deltas, step))
        return outcome if self.size is None else self._within(self.size, outcome, aligned, names, ctx)

    def _within(self, size: int, merged: Outcome, aligned: Aligned, names: Sequence[str], ctx: Context) -> Outcome:
        """Return the merged adapter cut to `size` bytes, its rows measured anew against the weighted sum."""
        cut = Truncate(size=size)(merged.adapter, ctx)

        def measure(row: Row) -> Row:
            held, after = aligned.deltas[row.key], cut.adapter.deltas[row.key]
            if after is merged.adapter.deltas[row.key]:
                return row
            free = [_resolved(row.key, d, ctx.base, n) for n, d in zip(names, held, strict=True)]
            target = weighted_sum(free, [w * self.scale for w in self._weights(len(held))])
            error = relative_error(target, after)
            return replace(row, rank_after=rank_of(after), nbytes_after=after.nbytes, error=error)

        by_key = {r.key: r for r in merged.rows}
        with one_blas_thread():
            rows = run(lambda k: measure(by_key[k]), list(by_key), ctx, "error")
        return Outcome(cut.adapter, tuple(rows), merged.notes)

    def _options(self) -> Options:
        given = {f.name: getattr(self, f.name) for f in fields(Options)}
        return Options(**{k: v for k, v in given.items() if v is not None})

    def _weights(self, count: int) -> tuple[float, ...]:
        weights = self.weights or (1.0 / count,) * count
        total = math.fsum(abs(w) for w in weights) if self.how.averages and self.space == "core" else 1.0
        return tuple(w / total for w in weights)

    def _parameter(self, key: str, aligned: Aligned, names: Sequence[str], ctx: Context) -> tuple[Delta, Row]:
        held = aligned.deltas[key]
        free = tuple(_resolved(key, d, ctx.base, n) for n, d in zip(names, held, strict=True))
        some = next(d for d in free if d is not None)
        ranks = [r for r in map(rank_of, (d for d in held if d is not None)) if r is not None]
        weights = self._weights(len(held))
        made: Delta
        if len(some.shape) < 2 or all(d is None or isinstance(d, Sparse) for d in free):
            made = self._entries(key, free, weights, _dtype(held, self.dtype))
            target = weighted_sum(free, [w * self.scale for w in weights])
            error, energy = relative_error(target, made), norm2(target)
        else:
            rank = self.rank or max(ranks, default=None)
            made, error, energy = self._matrix(key, free, weights, rank, _dtype(held, self.dtype), ctx.device)
        before = sum(d.nbytes for d in held if d is not None)
        tight = self.how.tight if self.rank is not None and ranks and self.rank <= max(ranks) else ""
        note = "; ".join(filter(None, (aligned.missing(key, names), tight)))
        return made, Row(key, kind(some), max(ranks, default=None), rank_of(made), before, made.nbytes, error, energy,
                         note)

    def _entries(self, key: str, free: Sequence[BaseFree | None], weights: tuple[float, ...], dtype: torch.dtype
                 ) -> BaseFree:
        """Merge what has entries and no factors: vectors are added, sparse deltas go through the elementwise rule."""
        some = next(d for d in free if d is not None)
        if len(some.shape) < 2:
            return Dense(weighted_sum(free, [w * self.scale for w in weights]).dense().to(dtype), 1.0, some.shape)
        if self.how.entries is None:
            raise UnsupportedError(f"{self.how.name} works on factors, this delta is sparse",
                                   hint="exact, ties, magnitude and dare merge sparse deltas entry by entry")
        indices, x = union([d for d in free if isinstance(d, Sparse)], [d is not None for d in free])
        merged = self.how.entries(x, Task(key, (), weights, 0, self._options())) * self.scale
        return Sparse(indices[merged != 0], merged[merged != 0].to(dtype), 1.0, some.shape)

    def _matrix(self, key: str, free: Sequence[BaseFree | None], weights: tuple[float, ...], rank: int | None,
                dtype: torch.dtype, device: str) -> tuple[Delta, float, float]:
        """Merge one parameter with factors; experts one by one, stacked again."""
        some = next(d for d in free if d is not None)
        made = [part(d, device) if d is not None else None for d in free]
        like = next(p for p in made if p is not None)
        parts = [p or absent(like) for p in made]
        if self.rank is None and (self.how.lossless or (self.size is not None and self.how.entries is not None)):
            rank = None
        elif rank is None:
            rank = max(p.a.shape[-2] for p in parts)
        if any(p.b.dim() != like.b.dim() for p in parts):
            raise UnsupportedError("some inputs hold it as experts, others as one matrix")
        if like.b.dim() == 2:
            b, a, error, energy = self._task(key, parts, weights, rank, dtype)
            return stored([b], [a], some.shape, dtype, batch=False), error, energy
        each = [self._task(f"{key}[{i}]", [p.expert(i) for p in parts], weights, rank, dtype)
                for i in range(like.b.shape[0])]
        energy = math.fsum(e for *_, e in each)
        lost = math.fsum(err**2 * e for *_, err, e in each if e)
        pair = stored([b for b, *_ in each], [a for _, a, *_ in each], some.shape, dtype, batch=True)
        return pair, math.sqrt(lost / energy) if energy else 0.0, energy

    def _task(self, key: str, parts: Sequence[Part], weights: tuple[float, ...], rank: int | None, dtype: torch.dtype
              ) -> tuple[Tensor, Tensor, float, float]:
        """Return (b, a) as stored, the distance to the weighted sum, and the latter's ||.||^2."""
        everything = sum(p.a.shape[0] for p in parts)
        task = Task(key, tuple(parts), weights, rank or everything, self._options())
        frame = task.joint
        if not float(frame.cores.abs().max() if frame.cores.numel() else 0.0):
            m, n = parts[0].b.shape[0], parts[0].a.shape[1]
            return torch.zeros(m, 1, dtype=dtype), torch.zeros(1, n, dtype=dtype), 0.0, 0.0
        result = self.how.run(task)
        if isinstance(result, InCore):  # its bases are made of the same stacked factors as those of `frame`
            made = result.joint.lift(result.m, task.rank, dtype, self.scale)
        else:
            b, a = result.b, result.a
            if rank is not None and a.shape[0] > rank:
                cut = truncate(b, a, rank)
                b, a = cut.b, cut.a
            eye = torch.eye(a.shape[0], dtype=torch.float64, device=a.device) * math.sqrt(abs(self.scale))
            made = frame.keep(b, eye, a, eye * math.copysign(1.0, self.scale), dtype)
        return made.b, made.a, *frame.departure(frame.weighted(weights) * self.scale, made)


_DEFAULTS = {f.name: f.default for f in fields(Merge)}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "space": ("core", "factors"), "gauge": ("balanced", "raw"), "dtype": (None, *DTYPES),
    "reweight": ("both", "parameter", "output", "none"),
}


def _resolved(key: str, delta: Delta | None, base: Base | None, name: str) -> BaseFree | None:
    """Return a base-dependent delta as what it adds to the base weight. Raises NeedsError without a base."""
    if not isinstance(delta, NeedsBase):
        return delta
    if base is None:
        raise NeedsError(f"{delta.kind} in {name} changes the base weight itself and cannot be added without it",
                         hint="pass --base with the folder of the base model")
    return delta.resolve(base.weight(key, delta.shape))


def _dtype(held: Sequence[Delta | None], wanted: str | None) -> torch.dtype:
    """Return the dtype to store: the one asked for, else the widest among the inputs, float32 for what has none."""
    if wanted is not None:
        return DTYPES[wanted]
    found: torch.dtype | None = None
    for delta in held:
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        own = next((getattr(inner, f).dtype for f in ("b", "weight", "values") if hasattr(inner, f)), torch.float32)
        if inner is not None:
            found = own if found is None else torch.promote_types(found, own)
    return found if found is not None and found.is_floating_point and found.itemsize < 8 else torch.float32


def merge(adapters: Sequence[Adapter], *, base: str | Path | None = None, jobs: int = 0, device: str = "cpu",
          **options: Any) -> Adapter:
    """Return one adapter from several of the same base model; options are those of the Merge join.

    merge([a, b], method="lego", rank=16), merge([a, b], weights=(0.6, 0.4)), merge([a, b, c], method="ties",
    density=0.3). `base`, a model folder, is only needed for inputs such as DoRA.
    """
    from adaptc.base import Base
    from adaptc.formats import size_of

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise UsageError(f"merge has no option {unknown[0]}", hint=nearest(unknown[0], list(_DEFAULTS)))
    ctx = Context(base=Base(Path(base)) if base else None, jobs=jobs, device=device, size_of=size_of)
    return Merge(**options)(adapters, ctx).adapter
