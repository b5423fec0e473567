"""Outputs appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptc.errors import AdaptcError, UsageError


@contextmanager
def staged(out: Path, *, force: bool = False, folder: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a temporary path in the folder of `out`; on success flush it and rename it to `out`, else remove it.

    An existing `out` is replaced only with `force`, and never when it is one of `inputs` or contains one, or when it is
    a folder that holds files the output has not. A kill at any moment leaves the old state or the whole new one; a
    folder is exchanged in one system call where the kernel can.
    """
    check(out, force=force, folder=folder, inputs=inputs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise AdaptcError(f"{out.parent}: {e.strerror or e}") from e
    inside = temp / out.name
    try:
        if folder:
            inside.mkdir()
        yield inside
        for path in [inside, *inside.rglob("*")] if folder else [inside]:
            _flush(path)
        if folder and out.exists():
            lost = sorted(p.name for p in out.iterdir() if not (inside / p.name).exists())
            if lost:
                more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                raise UsageError(f"{out} holds {lost[0]}{more}, which overwriting it would delete",
                                 hint="give another output with -o, or remove what is in the way")
            _exchange(inside, out)
        else:
            os.replace(inside, out)
        _flush(out.parent)
    except OSError as e:
        raise AdaptcError(f"{out}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def check(out: Path, *, force: bool = False, folder: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Raise UsageError where `staged` would: call it before long work, so that the work is not lost."""
    for source in inputs:
        if out.exists() and (out.resolve() == source.resolve() or out.resolve() in source.resolve().parents):
            raise UsageError(f"{out} is the input and is never overwritten", hint="give another output with -o")
    if out.exists() and not force:
        raise UsageError(f"{out} exists", hint="--force overwrites it, or give another output with -o")
    if out.exists() and out.is_dir() != folder:
        raise UsageError(f"{out} is a {'folder' if out.is_dir() else 'file'}, the output would be the other kind")


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: atomically through renameat2 (Linux), else by two renames."""
    at_cwd, swap = -100, 2
    try:
        done = ctypes.CDLL(None, use_errno=True).renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), swap) == 0
    except (OSError, AttributeError):
        done = False
    if not done:
        aside = new.with_name(new.name + ".old")
        os.rename(old, aside)
        os.rename(new, old)
