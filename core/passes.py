"""Pass, Join, Pipeline: pure functions on adapters, with a contract, a spec and a measured report."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from fnmatch import fnmatch
from math import fsum, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.delta import Delta, LowRank, NeedsBase, kind
from adaptc.errors import AdaptcError, NeedsError, UsageError
from adaptc.measure import norm2, relative_error
from adaptc.spec import print_spec

if TYPE_CHECKING:
    from adaptc.base import Base


class Need(Enum):
    """What a pass must be given besides the adapter; refused before any work starts."""

    BASE = "base"
    CALIBRATION = "calibration"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class Context:
    """What surrounds a run: base weights, calibration statistics, workers, device, progress, the target format.

    `size_of(adapter)` is the exact number of bytes the target format would write (tensors may be on the meta device).
    """

    base: Base | None = None
    calibration: Mapping[str, Any] | None = None
    jobs: int = 0
    device: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    size_of: Callable[[Adapter], int] | None = None

    def has(self, need: Need) -> bool:
        """Return whether `need` is met."""
        return (self.base if need is Need.BASE else self.calibration) is not None


@dataclass(frozen=True, slots=True)
class Change:
    """What a pass made of one delta.

    `error` is the measured relative error, None to have it measured from factors; `energy` is ||dW||^2 before, None to
    have it computed.
    """

    delta: Delta
    error: float | None = None
    note: str = ""
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One module in a report: rank and bytes before and after, measured relative error, ||dW||^2 before."""

    key: str
    kind: str
    rank_before: int | None
    rank_after: int | None
    nbytes_before: int
    nbytes_after: int
    error: float
    energy: float
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The adapter a pass made, a row a module, and facts worth saying."""

    adapter: Adapter
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Total relative error sqrt(sum ||dW - dW'||^2 / sum ||dW||^2) over all modules."""
        return total_error(self.rows)


def total_error(rows: Sequence[Row]) -> float:
    """Return sqrt(sum (error^2 * energy) / sum energy), 0 for no energy."""
    energy = fsum(r.energy for r in rows)
    lost = fsum(r.error**2 * r.energy for r in rows if r.energy)
    return sqrt(lost / energy) if energy else 0.0


def rank_of(delta: Delta) -> int | None:
    """Return the stored rank of a delta, looking inside base-dependent ones; None where there is no rank."""
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    return inner.rank if isinstance(inner, LowRank) else None


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A pure function on an adapter. Its dataclass fields are its options everywhere: CLI, recipe, Python, history.

    A subclass says which deltas it `handles`, `plan`s a setting for each of them (looking at all modules at once), and
    changes one `delta` at a time, so modules run in parallel. Anything else is left alone and reported as skipped.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def handles(self, delta: Delta) -> bool:
        """Return whether this pass can change `delta`."""
        return isinstance(delta, LowRank)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Any]:
        """Return the setting for each module to change."""
        return {key: None for key in self.selected(adapter)}

    @abstractmethod
    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return what becomes of one delta; pure."""

    def finish(self, before: Adapter, after: Adapter) -> Adapter:
        """Return the adapter after everything that is not per module; the default changes nothing."""
        return after

    def selected(self, adapter: Adapter) -> list[str]:
        """Return the keys this pass handles, after include and exclude patterns (fnmatch on the parameter name)."""
        def wanted(key: str) -> bool:
            if any(_matches(key, p) for p in self.exclude):
                return False
            return not self.include or any(_matches(key, p) for p in self.include)

        return [k for k, d in adapter.deltas.items() if wanted(k) and self.handles(d)]

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Outcome:
        """Run on a whole adapter. Raises AdaptcError naming the pass and the parameter that failed."""
        ctx = ctx or Context()
        for need in sorted(self.needs, key=lambda n: n.value):
            if not ctx.has(need):
                raise NeedsError(f"{self.name} needs {need.value}", hint=f"pass --{need.value}")
        with one_blas_thread():
            settings = self.plan(adapter, ctx)
            changes = dict(zip(settings, run(lambda k: self._change(k, adapter.deltas[k], settings[k]),
                                             list(settings), ctx, self.name), strict=True))
        rows: list[Row] = []
        deltas: dict[str, Delta] = {}
        for key, before in adapter.deltas.items():
            change, row = changes.get(key) or (None, skipped(key, before, self.name))
            rows.append(row)
            deltas[key] = before if change is None else change.delta
        outcome = Outcome(adapter.with_deltas(deltas), tuple(rows))
        after = self.finish(adapter, outcome.adapter)
        step = Step(str(self), __version__, adapter.nbytes, after.nbytes, outcome.error)
        return Outcome(after.with_deltas(after.deltas, step), outcome.rows)

    def _change(self, key: str, before: Delta, setting: Any) -> tuple[Change, Row]:
        try:
            change = self.delta(key, before, setting)
            error = relative_error(before, change.delta) if change.error is None else change.error
            energy = norm2(before) if change.energy is None else change.energy
        except AdaptcError as e:
            raise type(e)(f"{self.name}: {key}: {e}", hint=e.hint) from e
        after = change.delta
        return change, Row(key, kind(before), rank_of(before), rank_of(after), before.nbytes, after.nbytes, error, energy,
                           change.note)

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)}
        return print_spec(self.name, {k: v for k, v in values.items() if v != defaults[k]})


def _matches(key: str, pattern: str) -> bool:
    """Return whether an fnmatch pattern fits the whole parameter name or any dotted part of it."""
    return fnmatch(key, pattern) or fnmatch(key, f"*.{pattern}") or fnmatch(key, f"*.{pattern}.*")


def skipped(key: str, delta: Delta, why: str) -> Row:
    """Return the row of a delta that was left alone."""
    return Row(key, kind(delta), rank_of(delta), rank_of(delta), delta.nbytes, delta.nbytes, 0.0, norm2(delta),
               f"left alone by {why}")


class Join(ABC):
    """The many-to-one sibling of Pass: several adapters in, one out."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, adapters: Sequence[Adapter], ctx: Context | None = None) -> Outcome:
        """Return the joined adapter with a row a module."""


@dataclass(frozen=True)
class Pipeline:
    """Passes one after another; itself a pass. Rows compare the first input with the last output."""

    steps: tuple[Pass, ...] = field(default_factory=tuple)
    name: ClassVar[str] = "pipeline"

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Outcome:
        """Run every step. A failure names what ran before it."""
        now = adapter
        done: list[str] = []
        rows: dict[str, Row] = {}
        notes: list[str] = []
        for step in self.steps:
            try:
                outcome = step(now, ctx)
            except AdaptcError as e:
                ran = f" (after {', '.join(done)})" if done else ""
                raise type(e)(f"{e}{ran}", hint=e.hint) from e
            now = outcome.adapter
            done.append(str(step))
            notes += outcome.notes
            rows |= {r.key: r for r in outcome.rows}
        if len(self.steps) > 1:
            rows = {k: compare(k, adapter.deltas[k], now.deltas.get(k)) for k in adapter.deltas}
        return Outcome(now, tuple(rows.values()), tuple(notes))

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))


def compare(key: str, before: Delta, after: Delta | None) -> Row:
    """Return the row that compares a delta with what became of it (None: removed), error measured from factors."""
    energy = norm2(before)
    if after is None:
        return Row(key, kind(before), rank_of(before), 0, before.nbytes, 0, 1.0 if energy else 0.0, energy, "removed")
    return Row(key, kind(before), rank_of(before), rank_of(after), before.nbytes, after.nbytes,
               relative_error(before, after), energy)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give every worker one BLAS thread: tiny LAPACK calls stall 10 to 50 times longer on OpenMP barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(work: Callable[[str], Any], keys: Sequence[str], ctx: Context, label: str) -> list[Any]:
    """Return [work(k) for k in keys] over `ctx.jobs` threads (0: all cores), in order, reporting progress."""
    jobs = ctx.jobs or os.cpu_count() or 1
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}, must be 0 (all cores) or more")
    out: list[Any] = []
    with ThreadPoolExecutor(min(jobs, max(len(keys), 1))) as pool:
        for result in pool.map(lambda k: work(k), keys):
            out.append(result)
            if ctx.progress:
                ctx.progress(label, len(out), len(keys))
    return out
