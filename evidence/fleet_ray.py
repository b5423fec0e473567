"""Ray: the same work as Ray tasks, on a cluster that is there or on one made for the run."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from adaptc import __version__
from adaptc.errors import AdaptcError, NeedsError, UsageError
from adaptc.evidence.fleet import Lost, Results
from adaptc.evidence.fleet_work import Job, Result

# Ray talks a lot, and reports its use to its makers unless told not to; all of it is read when it is imported.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0",
          "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
_SECONDS = 10.0
_STORE = 80_000_000  # bytes of shared memory for a cluster of our own: results are a few hundred bytes each


class Ray:
    """A Ray cluster: the one at `address` (or in RAY_ADDRESS), else one of this machine with `jobs` cores.

    `jobs` 0 is every core of the cluster. A task whose worker dies is lost and not tried again: the next run does.
    """

    def __init__(self, jobs: int = 0, address: str | None = None) -> None:
        self.jobs, self.address = jobs, address or os.environ.get("RAY_ADDRESS")
        self._ray: Any = None
        self._mine, self._window = False, 1

    def __enter__(self) -> Ray:
        for key, value in _QUIET.items():
            os.environ.setdefault(key, value)
        try:
            import ray
        except ImportError as e:
            raise NeedsError("--engine ray needs Ray", hint="pip install 'adaptc[ray]'") from e
        self._ray = ray
        self._mine = not self._ray.is_initialized()
        if self._mine:
            self._connect()
        try:
            cores = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self.jobs = self.jobs or cores
            self._window = 2 * self.jobs if self.jobs >= cores else self.jobs
            self._check_workers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._mine:
            self._ray.shutdown()

    def map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Results:
        """Yield results as they come.

        As many tasks again as there are cores wait in line, and no more; none where the cluster has more cores than
        `jobs`, which would take them at once.
        """
        task = self._ray.remote(num_cpus=1, max_retries=0)(work)
        source = iter(jobs)
        pending: dict[Any, Job] = {}
        try:
            while True:
                while len(pending) < self._window and (job := next(source, None)) is not None:
                    pending[task.remote(job)] = job
                if not pending:
                    return
                ready, _ = self._ray.wait(list(pending), num_returns=1)
                job = pending.pop(ready[0])
                yield job, self._result(ready[0])
        finally:
            for ref in pending:
                self._ray.cancel(ref, force=True)

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        try:
            if self.address is None:
                own = {"num_cpus": self.jobs or None, "include_dashboard": False, "object_store_memory": _STORE}
                with _hushed():
                    self._ray.init(**own, **quiet)
            else:
                _reach(self.address)
                with _hushed():
                    self._ray.init(address=self.address, **quiet)
        except AdaptcError:
            raise
        except Exception as e:  # ConnectionError, TimeoutError, RuntimeError, by the way it fails
            where = f"Ray cluster {self.address}" if self.address else "a Ray cluster on this machine"
            if "AuthToken" in f"{e} {e.__cause__}":
                raise AdaptcError(f"{where} wants a token", hint="RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or "
                                  "RAY_AUTH_TOKEN_PATH, or the file that `ray get-auth-token` reads") from e
            said = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise AdaptcError(f"{where} cannot be reached ({said})", hint="--engine local needs no cluster") from e

    def _check_workers(self) -> None:
        """Raise AdaptcError unless the cluster's workers have this adaptc."""
        try:
            found = self._ray.get(self._ray.remote(num_cpus=1)(_version).remote(), timeout=6 * _SECONDS)
        except Exception as e:
            said = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
            raise AdaptcError(f"workers of the Ray cluster cannot run adaptc ({type(e).__name__}: {said.strip()})",
                              hint="install the same adaptc on every node") from e
        if found != __version__:
            raise AdaptcError(f"workers of the Ray cluster have adaptc {found}, here it is {__version__}",
                              hint="install the same adaptc on every node")

    def _result(self, ref: Any) -> Result | Lost:
        from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

        try:
            result = self._ray.get(ref)
        except OutOfMemoryError:
            return Lost("the worker process was ended by Ray, out of memory")
        except WorkerCrashedError:
            return Lost("the worker process was killed, likely out of memory")
        except RayError as e:
            said = next((line for line in str(e).splitlines() if line.strip()), "")
            return Lost(f"{type(e).__name__}: {said.strip()}")
        assert isinstance(result, Result)
        return result


@contextmanager
def _hushed() -> Iterator[None]:
    """Send to nowhere what Ray's compiled part writes to stderr while it connects; failures are raised as well."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _version() -> str:
    from adaptc import __version__ as found

    return found


def _reach(address: str) -> None:
    """Raise UsageError for an address that is none, AdaptcError for one where nobody answers: Ray itself would wait."""
    host, sep, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not sep or not port.isdigit():
        raise UsageError(f"Ray address {address} is not host:port", hint="such as 10.0.0.1:6379 or ray://host:10001")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except OSError as e:
        raise AdaptcError(f"Ray cluster {address} cannot be reached ({e.strerror or e})",
                          hint="ray status on its head node says whether it runs") from e
