"""Registries: id -> class, filled from entry points, so that a plugin is an installed package and nothing more."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from adaptc.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """One entry-point group. Classes are imported when they are asked for; an id has one owner."""

    def __init__(self, group: str, noun: str) -> None:
        self.group, self.noun = group, noun
        self._loaded: dict[str, T] = {}

    def ids(self) -> list[str]:
        """Return the known ids, sorted."""
        return sorted({e.name for e in entry_points(group=self.group)} | set(self._loaded))

    def get(self, id: str) -> T:
        """Return what is registered under `id`; an unknown id names the nearest three."""
        if id not in self._loaded:
            found = [e for e in entry_points(group=self.group) if e.name == id]
            if not found:
                near = difflib.get_close_matches(id, self.ids(), 3, 0.0)
                raise UsageError(f"{self.noun} {id} is not known", hint=f"nearest: {', '.join(near)}")
            if len({e.value for e in found}) > 1:
                raise UsageError(f"{self.noun} {id} is claimed by {' and '.join(e.value for e in found)}")
            self._loaded[id] = found[0].load()
        return self._loaded[id]

    def add(self, id: str, item: T) -> None:
        """Register `item` for this process; a taken id is refused."""
        if id in self.ids():
            raise UsageError(f"{self.noun} {id} is already registered")
        self._loaded[id] = item

    def items(self) -> list[tuple[str, T]]:
        """Return every (id, class), importing all of them."""
        return [(i, self.get(i)) for i in self.ids()]


PASSES: Registry[Any] = Registry("adaptc.passes", "pass")
CODECS: Registry[Any] = Registry("adaptc.codecs", "codec")
FORMATS: Registry[Any] = Registry("adaptc.formats", "dialect")
