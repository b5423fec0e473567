"""Opening what the user named, so that every failure says which input it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptc.errors import AdaptcError

if TYPE_CHECKING:
    from adaptc.adapter import Adapter
    from adaptc.base import Base
    from adaptc.calibration import Calibration
    from adaptc.formats.format import Evidence, Format
    from adaptc.formats.source import Source


@dataclass(frozen=True)
class Opened:
    """An adapter with the source it was read from, its dialect, and why it was taken for that."""

    name: str
    source: Source
    format: Format
    evidence: Evidence
    adapter: Adapter

    @property
    def files(self) -> dict[str, int]:
        """Names and bytes of everything the adapter is made of on disk: tensors, and the config beside them."""
        config = self.source.file.parent / "adapter_config.json"
        beside = {config.name: config.stat().st_size} if self.source.config and config.is_file() else {}
        return {**self.source.files, **beside}

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self.files.values())

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Paths that no output may replace."""
        return (self.source.path, self.source.file)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Let every AdaptcError raised inside say that it is about the input `name`."""
    try:
        yield
    except AdaptcError as e:
        e.path = e.path or name
        raise


def open_adapter(name: str, alpha: float | None = None, dialect: str | None = None, base: Base | None = None
                 ) -> Opened:
    """Open, recognise and read the adapter that the user called `name`.

    On a given base, deltas that are only defined on it become plain ones; DoRA stays what it is, passes know it.
    """
    from adaptc.formats.sniff import recognise
    from adaptc.formats.source import open_source

    with about(name):
        source = open_source(name, alpha=alpha)
        fmt, evidence = recognise(source, dialect)
        adapter = fmt.read(source)
        if base is not None:
            from adaptc.resolve import resolved

            adapter = resolved(adapter, base, keep=("dora",))
        return Opened(name, source, fmt, evidence, adapter)


def open_base(path: str | None) -> Base | None:
    """Open the base model at `path`, None where none was given."""
    from adaptc.base import Base

    return None if path is None else Base(Path(path))


def open_calibration(path: str | None) -> Calibration | None:
    """Open the calibration statistics at `path`, None where none were given."""
    from adaptc.calibration import Calibration

    return None if path is None else Calibration(Path(path))
