"""Format: a dialect that can be recognised, read, and usually written, with the list of what it cannot say."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from adaptc.adapter import Adapter, Step
from adaptc.errors import UnsupportedError, UsageError
from adaptc.formats.parts import joined
from adaptc.formats.source import Source
from adaptc.lowrank import plain
from adaptc.tensorfile import header_of, write_tensors

HISTORY_KEY = "adaptc.history"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a file is taken for a dialect. `strength`: 4 tensors that contradict the declaration beside them,
    3 a declaration in the file, 2 unmistakable keys, 1 a guess.
    """

    strength: int
    reason: str


@dataclass(frozen=True)
class TensorsFile:
    """Content of a safetensors file to be written; tensors may be on the meta device to measure only."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Exact file size."""
        return len(header_of(self.tensors, self.metadata)[0]) + sum(t.nbytes for t in self.tensors.values())


Content = bytes | TensorsFile


class Format(ABC):
    """One dialect. Readers consume every tensor or list it as carried; writers say what would be lost first.

    `contents` returns what would be written, by file name; a dialect that is one file uses the name "" for it. Sizes
    are exact before anything is written, because `contents` works on meta tensors too.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    writes: ClassVar[str] = "file"  # "file", "folder", or "" for read only
    exact_only: ClassVar[bool] = False  # written when asked for by name; anything changed goes to PEFT

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter as this dialect stores it: codes decoded and parts joined, unless it holds such."""
        return joined(adapter.map(lambda _, d: plain(d)))

    @abstractmethod
    def sniff(self, source: Source) -> Evidence | None:
        """Return why `source` is this dialect, or None. Looks at names, shapes, config and metadata only."""

    @abstractmethod
    def read(self, source: Source) -> Adapter:
        """Return the adapter. Raises FormatError for damaged data, UnsupportedError for what is refused by name."""

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Return what writing `adapter` in this dialect would lose, one clause each; empty when it is exact."""
        return (f"{self.title} is read only",)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the files that would be written."""
        raise UnsupportedError(f"{self.title} is read only here", hint="convert to peft, kohya, diffusers or mlx")

    def bare(self, adapter: Adapter) -> Content:
        """Return what is written when the output is one file. Raises UsageError for a dialect that needs its folder."""
        contents = self.contents(adapter)
        if set(contents) != {""}:
            raise UsageError(f"{self.title} is a folder of {' and '.join(contents)}",
                             hint="give an output without a suffix, which makes a folder")
        return contents[""]

    def write(self, adapter: Adapter, out: Path) -> None:
        """Write to `out`: into an existing empty folder, or as one file where there is nothing yet."""
        contents = self.contents(adapter) if out.is_dir() else {"": self.bare(adapter)}
        for name, content in contents.items():
            with (out / name if name else out).open("wb") as f:
                if isinstance(content, bytes):
                    f.write(content)
                else:
                    write_tensors(f, content.tensors, content.metadata)

    def size(self, adapter: Adapter, *, folder: bool = True) -> int:
        """Return the exact bytes `write` would produce over all files, or in the one file of a bare output."""
        contents = self.contents(adapter).values() if folder else (self.bare(adapter),)
        return sum(len(c) if isinstance(c, bytes) else c.nbytes for c in contents)


def history_metadata(adapter: Adapter) -> dict[str, str]:
    """Return the history as safetensors metadata, {} for an untouched adapter."""
    if not adapter.history:
        return {}
    return {HISTORY_KEY: json.dumps(history_steps(adapter), separators=(",", ":"))}


def history_steps(adapter: Adapter) -> list[dict[str, Any]]:
    """Return the history as JSON values, errors to six digits, so that its length is known before it is."""
    return [asdict(s) | {"error": None if s.error is None else float(f"{s.error:.6g}")} for s in adapter.history]


def read_history(metadata: Mapping[str, str]) -> tuple[Step, ...]:
    """Return the history stored in safetensors metadata; unreadable history is no history."""
    try:
        steps = tuple(Step(**s) for s in json.loads(metadata.get(HISTORY_KEY, "[]")))
    except (ValueError, TypeError, RecursionError):
        return ()
    return steps if all(isinstance(s.spec, str) and isinstance(s.version, str) and isinstance(s.nbytes_before, int)
                        and isinstance(s.nbytes_after, int) and isinstance(s.error, (float, int, type(None)))
                        for s in steps) else ()
