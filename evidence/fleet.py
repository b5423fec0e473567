"""A fleet: one recipe over many adapters, resumable, with a manifest; this decides what is work, engines do it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from adaptc import __version__
from adaptc.errors import NeedsError, UsageError
from adaptc.evidence.fleet_find import Unit
from adaptc.evidence.fleet_paths import STAGING, File, clear_staging, files_below, is_url, kind, local_copy
from adaptc.evidence.fleet_work import Job, Order, Result, content_hash, process
from adaptc.evidence.manifest import History, Manifest
from adaptc.hub import is_hub_id


@dataclass(frozen=True, slots=True)
class Lost:
    """A job whose process died, and how."""

    reason: str


Results: TypeAlias = Generator[tuple[Job, Result | Lost], None, None]


class Engine(Protocol):
    """Where jobs run. `map` takes a job only when it can start soon and yields results as they come."""

    jobs: int

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...

    def map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Results:
        """Yield every job with its result, or with how it was lost. Closed early, it stops what still runs."""


class Serial(AbstractContextManager["Serial"]):
    """One job after another in this process: for short lists, for debugging, and for stores that live in memory."""

    jobs = 1

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Results:
        """Yield every job with its result."""
        for job in jobs:
            yield job, work(job)


@dataclass(frozen=True)
class Plan:
    """What a run would do: `todo`, and the names that are done already. `clear`: nothing lies at the output yet."""

    todo: tuple[Job, ...]
    clear: frozenset[str]
    done: tuple[str, ...]
    order: Order

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(j.nbytes for j in self.todo)


def order_of(recipe: str | Path, **options: Any) -> Order:
    """Return the order that a recipe makes: a spec or a TOML file, checked whole before anything is read.

    Options: base, to, alpha, dialect, allow_loss. Raises UsageError for unknown passes and options, and for a recipe
    that begins with a merge; NeedsError for one that needs what a fleet is not given.
    """
    from adaptc.passes import Join, Need
    from adaptc.recipe import read_recipe
    from adaptc.registry import FORMATS

    pipeline = read_recipe(recipe)
    for step in pipeline.steps:
        if isinstance(step, Join):
            raise UsageError(f"{step.name} takes several adapters, a fleet runs the recipe on each alone",
                             hint="adaptc merge")
        for need in sorted(step.needs, key=lambda n: n.value):
            if need is not Need.BASE:
                raise NeedsError(f"{step.name} needs {need.value}, which no two adapters of a fleet share")
            if options.get("base") is None:
                raise NeedsError(f"{step.name} needs base", hint="pass --base")
    for dialect in (options.get("to"), options.get("dialect")):
        if dialect:
            FORMATS.get(dialect)
    base = options.get("base")
    if base is not None:
        if Path(base).exists():
            options["base"] = os.path.abspath(base)
        elif not is_hub_id(base, (".safetensors", ".gguf")):
            raise UsageError(f"base {base} does not exist")
    return Order(str(pipeline), **{k: v for k, v in options.items() if v is not None})


def plan(units: Sequence[Unit], order: Order, out: str, history: History, *, force: bool = False, verify: bool = False
         ) -> Plan:
    """Return what is to be done for `units` into `out`, given what a manifest tells of earlier runs.

    Done already is an adapter whose recipe, options, version and content are recorded with an output that is there in
    its full size; `verify` compares contents, not only sizes and times. Raises UsageError where outputs of another
    recipe or version are in the way, unless `force`, which does everything again.
    """
    there = _sizes(files_below(out))
    others: dict[str, int] = {}
    todo, clear, done = [], set(), []
    suffixes = _suffixes()
    for unit in units:
        last, known = history.finished.get(unit.name), ""
        whole = last is not None and _intact(last, there, out, verify)
        if last is not None and whole and not force:
            if (last.get("recipe"), last.get("version")) != (order.digest, __version__):
                said = f"{last.get('spec') or 'another recipe'} by adaptc {last.get('version')}"
                others[said] = others.get(said, 0) + 1
                continue
            if unit.stamp and unit.stamp == last.get("stamp") and not verify:
                done.append(unit.name)
                continue
            known = str(last.get("hash", ""))
        if not any(unit.name + s in there for s in ("", *suffixes)):
            clear.add(unit.name)
        source = unit.input if is_url(unit.input) else os.path.abspath(unit.input)
        place = out if is_url(out) else os.path.abspath(out)
        todo.append(Job(unit.name, source, unit.folder, tuple(unit.files), unit.nbytes, unit.stamp, place, order,
                        force or history.ours(unit.name), whole, known))
    if others:
        most = max(others, key=lambda k: others[k])
        raise UsageError(f"{out} holds {sum(others.values())} outputs of another recipe or version ({most})",
                         hint="--force does them again, or give another output folder with -o")
    return Plan(tuple(todo), frozenset(clear), tuple(done), order)


def run(plan: Plan, out: str, manifest: Manifest, engine: Engine) -> Generator[Result, None, None]:
    """Do what is planned and yield every result as it comes, written to the manifest before.

    What lies half done in the output folder is removed first and last; the manifest's lock says that nobody else
    writes there.
    """
    order = plan.order
    about = {"recipe": order.digest, "version": __version__, "spec": order.spec}
    clear_staging(out)
    manifest.append({"status": "run", "time": _now(), **about, "options": asdict(order), "todo": len(plan.todo),
                     "already": len(plan.done)})

    def handed_out() -> Iterator[Job]:
        for job in plan.todo:
            manifest.append({"status": "started", "name": job.name, "clear": job.name in plan.clear})
            yield job

    results = engine.map(process, handed_out())
    try:
        for job, result in results:
            if isinstance(result, Lost):
                result = Result(job.name, job.input, "failed", job.stamp, bytes_before=job.nbytes, reason=result.reason)
            line = asdict(result) | about | {"time": _now(), "seconds": round(result.seconds, 4)}
            if result.error is not None and not math.isfinite(result.error):
                line["error"] = None
            manifest.append(line)
            yield result
    finally:
        results.close()  # whatever stopped this, no worker writes any more
        clear_staging(out)
        _drop_empty(out, plan.todo)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sizes(files: dict[str, File]) -> dict[str, int]:
    """Return the bytes below every path, of files and of the folders they lie in."""
    sizes: dict[str, int] = {}
    for path, file in files.items():
        sizes[path] = file.nbytes
        while "/" in path:
            path = path.rpartition("/")[0]
            sizes[path] = sizes.get(path, 0) + file.nbytes
    return sizes


def _intact(line: dict[str, Any], there: dict[str, int], out: str, verify: bool) -> bool:
    """Return whether the output of a finished adapter is there whole: its size, with `verify` its content."""
    output = str(line.get("output", ""))
    if not output or there.get(output) != line.get("bytes_after"):
        return False
    if not verify:
        return True
    place = f"{out}/{output}"
    folder = kind(place) == "folder"
    names = tuple(sorted(files_below(place, deep=False))) if folder else (output.rpartition("/")[2],)
    with local_copy(place, names, folder) as path:
        return content_hash([path / n for n in names] if folder else [path]) == line.get("output_hash")


def _suffixes() -> set[str]:
    from adaptc.registry import FORMATS

    return {getattr(cls, "suffix", ".safetensors") for _, cls in FORMATS.items()}


def _drop_empty(out: str, jobs: Iterable[Job]) -> None:
    """Remove folders that were made for outputs which then could not be written."""
    if is_url(out):
        return
    with suppress(OSError):
        (Path(out) / STAGING).rmdir()
    for job in jobs:
        folder = Path(out) / job.name
        while folder != Path(out):
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                break
            folder = folder.parent
