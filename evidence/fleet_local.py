"""Local: worker processes of this machine, one pipe each.

Not joblib: a worker that is killed (out of memory) breaks a loky or concurrent.futures pool as a whole. Of 20 jobs with
one that kills its process, loky gave 4 results and then an error for all, futures lost 13; here one is lost, and it is
known which. A job also costs less, 0.11 ms where loky took 0.67 and futures 0.71 (1000 empty jobs, 2 workers).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.evidence.fleet import Lost, Results
from adaptc.evidence.fleet_work import Job, Result, prepare

_READY = "ready"
_KILL_WITH_PARENT = 1  # prctl PR_SET_PDEATHSIG
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection[Any, Any]
    ready: bool = False
    job: Job | None = None


class Local:
    """Worker processes, started on entry, replaced when one dies. `jobs` 0 is one for every core this process has."""

    def __init__(self, jobs: int = 0) -> None:
        self.jobs = jobs or cores()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Local:
        with _one_thread():
            self._workers = [_start() for _ in range(self.jobs)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.kill()  # idle, or stopped in the middle: outputs are whole or not there
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def warm(self) -> None:
        """Wait until every worker has loaded what it needs."""
        for worker in self._workers:
            while not worker.ready:
                self._received(worker)

    def map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Results:
        """Yield results as they come; each worker holds one job, none wait in line.

        Raises AdaptcError where workers die before they have taken any job.
        """
        source = iter(jobs)
        try:
            for worker in self._workers:
                self._hand(worker, work, source)
            while busy := [w for w in self._workers if w.job is not None]:
                for pipe in wait([w.pipe for w in busy]):
                    worker = next(w for w in busy if w.pipe is pipe)
                    job, result = worker.job, self._received(worker)
                    if result is None or job is None:
                        continue
                    worker.job = None
                    self._hand(worker, work, source)
                    yield job, result
        finally:
            for worker in self._workers:
                if worker.job is not None:  # the run stops here: nobody writes any more when this returns
                    worker.process.kill()
                    worker.process.join()
                    worker.job = None

    def _hand(self, worker: _Worker, work: Callable[[Job], Result], source: Iterator[Job]) -> None:
        if (job := next(source, None)) is not None:
            worker.job = job
            with suppress(OSError):  # dead: the next receive says so
                worker.pipe.send((work, job))

    def _received(self, worker: _Worker) -> Result | Lost | None:
        """Return a result, how the worker was lost (another takes its place), or None for one that became ready."""
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            return self._replaced(worker)
        if said == _READY:
            worker.ready = True
            return None
        assert isinstance(said, Result)
        return said

    def _replaced(self, worker: _Worker) -> Lost:
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode or 0
        if not worker.ready:
            raise AdaptcError(f"a worker process stopped before its first adapter, exit code {code}",
                              hint="what it said is above; --engine serial runs without workers")
        fresh = _start()
        worker.process, worker.pipe, worker.ready = fresh.process, fresh.pipe, False
        return Lost(_death(code))


def _start() -> _Worker:
    spawn = get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
    with _one_thread():
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection[Any, Any], parent: int) -> None:
    """Do jobs until the pipe closes; never outlive the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole group: the run decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            return
    prepare()
    try:
        pipe.send(_READY)
        while True:
            work, job = pipe.recv()
            pipe.send(work(job))
    except (EOFError, OSError):
        return


def _death(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
        return f"the worker process was ended by {name}{', likely out of memory' if name == 'SIGKILL' else ''}"
    return f"the worker process ended with exit code {code}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start inside have one BLAS thread: libraries read it from the environment when they load."""
    before = {k: os.environ.get(k) for k in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
