"""Outputs appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adaptc.errors import AdaptcError, UsageError

_NO_REPLACE, _SWAP = 1, 2  # flags of renameat2
_UNABLE = (errno.ENOSYS, errno.EINVAL)  # no such call here, or not on this file system


@contextmanager
def staged(out: Path, *, force: bool = False, folder: bool = False, inputs: tuple[Path, ...] = (),
           room: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `out`; on success flush it and rename it to `out`, else remove it.

    `room` is another folder of the same file system for it.

    An existing `out` is replaced only with `force`, and never when it is one of `inputs` or contains one, or when it is
    a folder that holds files the output has not. A link in the way of a file is replaced itself, never what it points
    to. A kill at any moment leaves the old state or the whole new one; a folder is exchanged in one system call where
    the kernel can. Whatever fails, nothing of the attempt stays: temporary files and new parent folders are removed.
    """
    check(out, force=force, folder=folder, inputs=inputs)
    try:
        made = _parents(out.parent)
        temp = Path(tempfile.mkdtemp(prefix=".adaptc-", dir=room or out.parent))
    except OSError as e:
        raise AdaptcError(f"{out.parent}: {e.strerror or e}") from e
    inside, done = temp / out.name, False
    try:
        if folder:
            inside.mkdir()
        yield inside
        for path in [inside, *inside.rglob("*")] if folder else [inside]:
            _flush(path)
        if folder and out.is_dir():
            _only_replaced(inside, out)
            _exchange(inside, out)
        elif force or (code := _renameat2(inside, out, _NO_REPLACE)) in _UNABLE:
            os.replace(inside, out)
        elif code:
            raise OSError(code, os.strerror(code))
        done = True
        _flush(out.parent)
    except OSError as e:
        raise AdaptcError(f"{out}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        for parent in () if done else reversed(made):
            with suppress(OSError):
                parent.rmdir()


def check(out: Path, *, force: bool = False, folder: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Raise UsageError where `staged` would: call it before long work, so that the work is not lost."""
    if "\0" in str(out):
        raise UsageError("the output's name holds a NUL character")
    if out.name in ("", "..") or out.is_mount():
        raise UsageError(f"{out} is no name for an output", hint="give a file or folder that adaptc may create")
    try:
        exists = os.path.lexists(out)
        for source in inputs:
            if out.exists() and source.exists() and (out.samefile(source) or out.resolve() in source.resolve().parents):
                raise UsageError(f"{out} is the input and is never overwritten", hint="give another output with -o")
        if exists and not force:
            raise UsageError(f"{out} exists", hint="--force overwrites it, or give another output with -o")
        if folder and out.is_symlink():
            raise UsageError(f"{out} is a symbolic link", hint="give the folder it points to with -o")
        if exists and not out.is_symlink() and out.is_dir() != folder:
            what = "folder" if out.is_dir() else "file"
            raise UsageError(f"{out} is a {what}, the output would be the other kind")
        if exists and not out.is_symlink() and not out.is_dir() and not out.is_file():
            raise UsageError(f"{out} is no regular file and is not replaced")
    except OSError as e:
        raise AdaptcError(f"{out}: {e.strerror or e}") from e


def _parents(folder: Path) -> list[Path]:
    """Create `folder`; return what was missing of its path, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing[::-1]


def _only_replaced(new: Path, old: Path) -> None:
    """Raise UsageError if the folder `old` holds something that `new` would not put another in the place of."""
    lost = sorted(p.name for p in old.iterdir() if not (new / p.name).exists())
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(f"{old} holds {lost[0]}{more}, which overwriting it would delete",
                         hint="give another output with -o, or remove what is in the way")


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: atomically through renameat2 (Linux), else by two renames."""
    if not _renameat2(new, old, _SWAP):
        return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise


def _renameat2(new: Path, old: Path, flags: int) -> int:
    """Return 0 after a rename with `flags`, else the error number; ENOSYS where the system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return errno.ENOSYS
    at_cwd = -100
    return 0 if call(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), flags) == 0 else ctypes.get_errno()
