"""Pass and Join: pure functions on adapters, with a contract, a spec and a measured report."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.delta import Delta, LowRank, kind
from adaptc.errors import AdaptcError, FormatError, LossError, NeedsError, UsageError
from adaptc.measure import relative_error
from adaptc.report import Row, energy_of, rank_of, total_error, untouched
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
    `cache` is a folder for what a pass finds out about the base and can use again, None for the user's own.
    """

    base: Base | None = None
    calibration: Mapping[str, Any] | None = None
    jobs: int = 0
    device: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    size_of: Callable[[Adapter], int] | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise UsageError(f"jobs is {self.jobs}, must be 0 (all cores) or more")
        if self.device != "cpu":
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, NotImplementedError) as e:  # torch has no one type for "not here"
                raise UsageError(f"device {self.device} is not available here") from e

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


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A pure function on an adapter. Its dataclass fields are its options everywhere: CLI, recipe, Python, history.

    A subclass says which deltas it `handles`, `plan`s a setting for each of them (looking at all modules at once), and
    changes one `delta` at a time, so modules run in parallel. Anything else is left alone and reported as skipped.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    container: ClassVar[str] = ""  # the dialect that holds what this pass makes, where the adapter's own cannot
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
        """Return the adapter after everything that is not per module: marked for its container, where it has one."""
        return replace(after, origin=replace(after.origin, container=self.container)) if self.container else after

    def remarks(self, before: Adapter, after: Adapter) -> tuple[str, ...]:
        """Return facts about the result that belong in its report, one clause each."""
        return ()

    def selected(self, adapter: Adapter) -> list[str]:
        """Return the keys this pass handles, after include and exclude patterns.

        A pattern (fnmatch) fits a whole parameter name or any dotted part of it: "q_proj", "layers.0", "*.mlp.*".
        Raises UsageError for a pattern that fits nothing, which is a typing error more often than a wish.
        """
        for option in ("include", "exclude"):
            for p in getattr(self, option):
                if not any(matches(k, p) for k in adapter.deltas):
                    raise UsageError(f"{option} pattern {p!r} fits none of {len(adapter.deltas)} parameters",
                                     hint=f"they are called {', '.join(list(adapter.deltas)[:2])}, ...")
        return [k for k, d in adapter.deltas.items() if not self.skips(k, d)]

    def skips(self, key: str, delta: Delta) -> str:
        """Return why this pass leaves a delta alone, "" when it does not."""
        if any(matches(key, p) for p in self.exclude):
            return "excluded"
        if self.include and not any(matches(key, p) for p in self.include):
            return "not included"
        return "" if self.handles(delta) else f"{self.name} does not handle {kind(delta)}"

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Outcome:
        """Run on a whole adapter. Raises AdaptcError naming the pass and the parameter that failed."""
        ctx = ctx or Context()
        for need in sorted(self.needs, key=lambda n: n.value):
            if not ctx.has(need):
                raise NeedsError(f"{self.name} needs {need.value}", hint=f"pass --{need.value}")
        try:
            with one_blas_thread():
                settings = self.plan(adapter, ctx)
                made = run(lambda k: self._module(k, adapter.deltas[k], settings), list(adapter.deltas), ctx, self.name)
        except AdaptcError as e:
            raise located(e, f"{self.name}: {e}") from e
        rows = tuple(row for _, row in made)
        deltas = {row.key: delta for delta, row in made}
        after = self.finish(adapter, adapter.with_deltas(deltas))
        step = Step(str(self), __version__, adapter.nbytes, after.nbytes, total_error(rows))
        return Outcome(after.with_deltas(after.deltas, step), rows, self.remarks(adapter, after))

    def _module(self, key: str, before: Delta, settings: Mapping[str, Any]) -> tuple[Delta, Row]:
        if key not in settings:
            return before, untouched(key, before, self.skips(key, before) or f"{self.name} does not need to change it")
        change = self.delta(key, before, settings[key])
        after = change.delta
        error = relative_error(before, after) if change.error is None else change.error
        energy = energy_of(before) if change.energy is None else change.energy
        return after, Row(key, kind(before), rank_of(before), rank_of(after), before.nbytes, after.nbytes, error,
                          energy, change.note)

    def __str__(self) -> str:
        return _spec(self)


def _spec(step: Pass | Join) -> str:
    """Return the written form of a pass or join: its name, and the options that are not their defaults."""
    values = {f.name: (getattr(step, f.name), f.default) for f in fields(step) if f.init}
    return print_spec(step.name, {k: v for k, (v, default) in values.items() if v != default})


def matches(key: str, pattern: str) -> bool:
    """Return whether an fnmatch pattern fits the whole parameter name or any dotted part of it."""
    return any(fnmatch(key, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def located(error: AdaptcError, message: str) -> AdaptcError:
    """Return an error of the same type that says `message`, with the hint (and losses) of `error`."""
    if isinstance(error, LossError):
        return LossError(message, error.losses, hint=error.hint)
    return type(error)(message, hint=error.hint)


@dataclass(frozen=True, kw_only=True)
class Join(ABC):
    """The many-to-one sibling of Pass: several adapters in, one out. Its fields are its options, as in a Pass."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, adapters: Sequence[Adapter], ctx: Context | None = None) -> Outcome:
        """Return the joined adapter with a row a module."""

    def __str__(self) -> str:
        return _spec(self)


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
    """Return [work(k) for k in keys] over `ctx.jobs` threads (0: all cores), in order, reporting progress.

    The first failure stops the rest. Raises AdaptcError naming the key.
    """
    def one(key: str) -> Any:
        try:
            return work(key)
        except AdaptcError as e:
            raise located(e, str(e) if str(e).startswith(key) else f"{key}: {e}") from e
        except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
            raise FormatError(f"{key}: a decomposition does not converge, values are not finite") from e

    jobs = ctx.jobs or os.cpu_count() or 1
    out: list[Any] = []
    with ThreadPoolExecutor(min(jobs, max(len(keys), 1))) as pool:
        for result in pool.map(one, keys):
            out.append(result)
            if ctx.progress:
                ctx.progress(label, len(out), len(keys))
    return out
