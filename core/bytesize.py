"""Byte counts as people write them: 2MiB, 1.5MB, 500KB, 4096."""

from __future__ import annotations

import re

from adaptc.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")
_HINT = "such as 2MiB (2097152 bytes), 2MB (2000000 bytes), 500KB, or a plain number of bytes"


def read_nbytes(text: str) -> int:
    """Return the whole bytes that `text` names, rounded down. Raises UsageError for what is not one clear number."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise UsageError(f"size {text!r} is not a number of bytes", hint=_HINT)
    number, unit = found.groups()
    if unit.lower() in ("k", "m", "g"):
        raise UsageError(f"size {text!r} could mean {number}{unit.upper()}B or {number}{unit.upper()}iB", hint=_HINT)
    if unit.lower() not in _UNITS:
        raise UsageError(f"size {text!r} has unit {unit!r}, known are B, KB, MB, GB, KiB, MiB, GiB", hint=_HINT)
    whole, _, part = number.partition(".")  # in integers: a float would lose bytes of large sizes
    scale: int = 10 ** len(part)
    nbytes = int((whole or "0") + part) * _UNITS[unit.lower()] // scale
    if nbytes < 1:
        raise UsageError(f"size {text!r} is {nbytes} bytes, must be positive", hint=_HINT)
    return nbytes


def print_nbytes(nbytes: int) -> str:
    """Return a byte count for people, three significant digits: 512 B, 1.46 KiB, 37.8 MiB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    value, units = float(nbytes), ("KiB", "MiB", "GiB", "TiB")
    for unit in units:
        value /= 1024
        if value < 999.5 or unit == units[-1]:
            break
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def short_nbytes(nbytes: int) -> str:
    """Return a byte count without spaces, exact and as short as that allows: 2MiB, 500KB, 12345B; for file names."""
    for unit, scale in (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("KiB", 2**10), ("KB", 10**3)):
        if nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return f"{nbytes}B"
