"""Folders of a fleet: local ones, and whatever fsspec opens (s3://, gs://, hf://, ...), with the same few verbs."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.errors import AdaptcError, NeedsError, UsageError

STAGING = ".adaptc-batch"  # in the output folder: everything that is not whole yet


@dataclass(frozen=True, slots=True)
class File:
    """Bytes of a file, and what changes when it is written again: modification time, ETag or version."""

    nbytes: int
    stamp: str


def is_url(path: str) -> bool:
    """Return whether `path` is for fsspec."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of `url` and the path in it.

    Raises NeedsError where fsspec or the driver is not installed, UsageError for an unknown scheme.
    """
    scheme = url.split("://", 1)[0]
    try:
        import fsspec
    except ImportError as e:
        raise NeedsError(f"{scheme}:// needs fsspec", hint="pip install 'adaptc[fleet]'") from e
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise NeedsError(f"{scheme}:// needs a driver that is not installed", hint=str(e)) from e
    except ValueError as e:
        raise UsageError(f"{url} has scheme {scheme}, which fsspec does not know") from e
    except Exception as e:  # drivers raise their own types for credentials and connections
        raise AdaptcError(f"{url} cannot be opened ({type(e).__name__}: {e})") from e
    return fs, str(path).rstrip("/")


@contextmanager
def told(url: str) -> Iterator[None]:
    """Let what a driver raises inside be one line about `url`: every driver has its own types."""
    try:
        yield
    except (AdaptcError, MemoryError):
        raise
    except Exception as e:
        raise AdaptcError(f"{url}: {type(e).__name__}: {e}") from e


def kind(path: str) -> str:
    """Return "file", "folder", or "" where there is nothing."""
    if not is_url(path):
        return "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else ""
    fs, inside = filesystem(path)
    with told(path):
        return "folder" if fs.isdir(inside) else "file" if fs.isfile(inside) else ""


def files_below(root: str, *, deep: bool = True) -> dict[str, File]:
    """Return the files below a folder by relative path, hidden ones left out, links followed once; {} for none."""
    if is_url(root):
        return _remote_files(root, deep)
    found: dict[str, File] = {}
    seen: set[tuple[int, int]] = set()

    def walk(folder: str, prefix: str) -> None:
        try:
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                return
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        except OSError as e:
            raise AdaptcError(f"{folder}: {e.strerror or e}") from e
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if deep:
                    walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                stat = entry.stat()
                found[prefix + entry.name] = File(stat.st_size, str(stat.st_mtime_ns))

    walk(root or ".", "")
    return found


def _remote_files(root: str, deep: bool) -> dict[str, File]:
    fs, path = filesystem(root)
    found = {}
    with told(root):
        listing = fs.find(path, maxdepth=None if deep else 1, detail=True)
    for name, info in sorted(listing.items()):
        inside = str(name)[len(path) :].lstrip("/")
        if inside and not any(part.startswith(".") for part in inside.split("/")):
            found[inside] = File(int(info.get("size") or 0), _stamp(info))
    return found


def _stamp(info: dict[str, Any]) -> str:
    """Return what identifies a version of an object; "" where the store says nothing, and contents are compared."""
    for key in ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified", "last_modified"):
        if info.get(key) is not None:
            return str(info[key])
    return ""


@contextmanager
def local_copy(path: str, files: tuple[str, ...], folder: bool) -> Iterator[Path]:
    """Yield `path` on this machine: itself, or a copy of its `files` in a temporary folder that is removed after."""
    if not is_url(path):
        yield Path(path)
        return
    fs, inside = filesystem(path)
    with tempfile.TemporaryDirectory(prefix="adaptc-") as temp:
        parent = inside if folder else inside.rsplit("/", 1)[0]
        with told(path):
            for name in files:
                fs.get_file(f"{parent}/{name}", f"{temp}/{name}")
        yield Path(temp) if folder else Path(temp) / inside.rsplit("/", 1)[-1]


def publish(made: Path, out: str, name: str, replace: bool) -> None:
    """Upload a file or folder to `out`/`name`: first under the staging folder, then moved file by file, tensors last.

    A store without a rename of folders can be stopped between two moves; the next run does that adapter again.
    """
    fs, root = filesystem(out)
    target, staging = f"{root}/{name}", f"{root}/{STAGING}/{uuid.uuid4().hex}"
    names = sorted((p.name for p in made.iterdir()), key=lambda n: not n.endswith(".json")) if made.is_dir() else [""]
    with told(f"{out}/{name}"):
        old = {str(p) for p in fs.find(target)} if fs.exists(target) else set()
        if old and not replace:
            raise UsageError(f"{out}/{name} exists", hint="--force overwrites it")
        places = {f"{staging}/{n or made.name}": f"{target}/{n}" if n else target for n in names}
        fs.makedirs(staging, exist_ok=True)
        for source, n in zip(places, names, strict=True):
            fs.put_file(str(made / n if n else made), source)
        fs.makedirs((target if names != [""] else target.rsplit("/", 1)[0]), exist_ok=True)
        for source, place in places.items():
            fs.mv(source, place)
        for gone in old - {p for p in places.values()} - {p.lstrip("/") for p in places.values()}:
            fs.rm_file(gone)
        fs.rm(staging, recursive=True) if fs.exists(staging) else None


def clear_staging(out: str) -> None:
    """Remove what a run left that was killed; only while no other run writes to `out`."""
    if is_url(out):
        fs, root = filesystem(out)
        with told(out):
            if fs.exists(f"{root}/{STAGING}"):
                fs.rm(f"{root}/{STAGING}", recursive=True)
    else:
        shutil.rmtree(Path(out) / STAGING, ignore_errors=True)
