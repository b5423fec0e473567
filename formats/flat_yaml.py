"""The top level of a small YAML file: `key: scalar` lines, which is all that the configs beside some adapters hold."""

from __future__ import annotations

import re
from pathlib import Path

from adaptc.errors import FormatError

MAX_BYTES = 2**20
Scalar = str | int | float | bool | None
_LINE = re.compile(r"([A-Za-z_]\w*):(?:\s+(.*?))?\s*")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_flat_yaml(path: Path) -> dict[str, Scalar]:
    """Return the scalars at the top level of `path`, {} if it is absent; nested values are passed over.

    Raises FormatError for a file that is no text, or too big to be a config.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path.name} has {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise FormatError(f"{path.name} is not UTF-8 text") from e
    found = (_LINE.fullmatch(line.split(" #")[0]) for line in lines)
    return {m[1]: _scalar((m[2] or "").strip()) for m in found if m}


def _scalar(text: str) -> Scalar:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
