"""The manifest of a fleet: one JSON line for everything that happened, only ever added to, and a table at the end."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.evidence.fleet_paths import filesystem, is_url, told

NAME, SUMMARY = "manifest.jsonl", "summary.csv"
COLUMNS = ("name", "status", "input", "output", "bytes_before", "bytes_after", "error", "seconds", "hash",
           "output_hash", "recipe", "version", "reason")


class History:
    """What the lines of a manifest say of every adapter: its last result, and whether its output is ours.

    Lines: status "run" opens a run; "started" is written before an adapter is handed out, with `clear` where nothing
    was at the place of its output; "done", "same" and "failed" are results.
    """

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, Any]] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        self.started: dict[str, bool] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take one line into account."""
        status, name = line.get("status"), str(line.get("name", ""))
        if status == "started":
            self.started[name] = bool(line.get("clear"))
        elif status in ("done", "same", "failed"):
            self.started.pop(name, None)
            if status == "same":  # touched only: the figures are those of the run that made the output
                line = {**self.finished.get(name, {}), "stamp": line.get("stamp"), "status": "done", "name": name}
            self.latest[name] = dict(line)
            if status != "failed":
                self.finished[name] = dict(line)

    def ours(self, name: str) -> bool:
        """Return whether what lies at the output of `name` was made by an earlier run, finished or killed."""
        return name in self.finished or self.started.get(name, False)


def read_manifest(path: Path) -> History:
    """Return what a manifest says, nothing for one that is not there. A last line cut short by a crash is dropped.

    Raises FormatError naming the line that is no JSON object.
    """
    try:
        return _parsed(path.read_bytes(), str(path))
    except FileNotFoundError:
        return History()
    except OSError as e:
        raise AdaptcError(f"{path}: {e.strerror or e}") from e


def history_of(out: str) -> History:
    """Return what the manifest of an output folder says, writing nothing; one in a store is read there."""
    path = local_manifest(out)
    if not is_url(out) or path.exists():
        return read_manifest(path)
    fs, root = filesystem(out)
    with told(f"{out}/{NAME}"):
        raw = fs.cat_file(f"{root}/{NAME}") if fs.exists(f"{root}/{NAME}") else b""
    return _parsed(raw, f"{out}/{NAME}")


def _parsed(raw: bytes, where: str) -> History:
    history = History()
    for number, text in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise FormatError(f"{where}: line {number} is no JSON object", hint="it is no manifest, or was edited")
        history.add(line)
    return history


class Manifest:
    """A manifest open for adding, by one process at a time; every line is one write."""

    def __init__(self, path: Path) -> None:
        self.path, self._synced = path, 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise AdaptcError(f"{path}: {e.strerror or e}") from e
        try:
            self._lock()
            self.history = read_manifest(path)
            raw = path.read_bytes()
            os.ftruncate(self._fd, raw.rfind(b"\n") + 1)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UsageError(f"{self.path} is in use, another run is writing there",
                             hint="wait for it, or give another output folder with -o") from e

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line. Raises AdaptcError where the disk is full."""
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=False, default=str).encode() + b"\n"
        try:
            if os.write(self._fd, text) != len(text):
                raise OSError(28, "no space left on device")
            if time.monotonic() > self._synced + 1:  # a killed process loses nothing, a lost machine one second
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except OSError as e:
            raise AdaptcError(f"{self.path}: {e.strerror or e}") from e
        self.history.add(line)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.fsync(self._fd)
        os.close(self._fd)


def local_manifest(out: str) -> Path:
    """Return where the manifest of `out` is written: in it, or in the current folder for one in a store."""
    if not is_url(out):
        return Path(out) / NAME
    slug = "-".join(p for p in out.split("://", 1)[1].split("/") if p)
    return Path(f"{slug}.{NAME}")


@contextmanager
def manifest_of(out: str) -> Iterator[Manifest]:
    """Open the manifest of an output folder; one in a store is fetched first where it is not here, and uploaded after.

    The summary is written last, whatever happened.
    """
    path = local_manifest(out)
    if is_url(out) and not path.exists():
        _fetch(out, path)
    made = not path.parent.exists()
    with Manifest(path) as manifest:
        try:
            yield manifest
        finally:
            if not path.stat().st_size:  # stopped before anything began: as if it had never been
                path.unlink()
                if made:
                    path.parent.rmdir()
            else:
                _finish(out, path, summary(manifest.history).encode())


def _finish(out: str, path: Path, table: bytes) -> None:
    if is_url(out):
        fs, root = filesystem(out)
        with told(f"{out}/{NAME}"):
            fs.makedirs(root, exist_ok=True)
            fs.put_file(str(path), f"{root}/{NAME}")
            fs.pipe_file(f"{root}/{SUMMARY}", table)
    else:
        temp = path.with_name(f".{SUMMARY}")
        temp.write_bytes(table)
        os.replace(temp, path.with_name(SUMMARY))


def summary(history: History) -> str:
    """Return the last result of every adapter as CSV."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for name in sorted(history.latest):
        rows.writerow(history.latest[name])
    return text.getvalue()


def _fetch(out: str, path: Path) -> None:
    fs, root = filesystem(out)
    with told(f"{out}/{NAME}"):
        if fs.exists(f"{root}/{NAME}"):
            fs.get_file(f"{root}/{NAME}", str(path))
