"""Registries: id -> class, filled from entry points, so that a plugin is an installed package and nothing more."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from adaptc.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """One entry-point group. Classes are imported when they are asked for; an id has one owner."""

    def __init__(self, group: str, noun: str, hidden: Sequence[str] = ()) -> None:
        self.group, self.noun, self.hidden = group, noun, hidden  # `hidden` ids are never offered in a hint
        self._loaded: dict[str, T] = {}

    @cached_property
    def _declared(self) -> dict[str, list[EntryPoint]]:
        """Entry points by id; read once, because finding them looks into every installed distribution."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            found.setdefault(entry.name, []).append(entry)
        return found

    def ids(self) -> list[str]:
        """Return the known ids, sorted."""
        return sorted({*self._declared, *self._loaded})

    def offered(self) -> list[str]:
        """Return the ids that make sense to ask for, sorted."""
        return [i for i in self.ids() if i not in self.hidden]

    def get(self, id: str) -> T:
        """Return what is registered under `id`.

        Raises UsageError for an unknown id (naming the nearest three), for one that two packages claim, and for a
        plugin that cannot be imported.
        """
        if id not in self._loaded:
            found = self._declared.get(id)
            if not found:
                raise UsageError(f"{self.noun} {id} is not known", hint=nearest(id, self.offered()))
            owners = sorted({e.value for e in found})
            if len(owners) > 1:
                raise UsageError(f"{self.noun} {id} is claimed by {' and '.join(owners)}")
            try:
                self._loaded[id] = found[0].load()
            except (ImportError, AttributeError) as e:
                raise UsageError(f"{self.noun} {id} cannot be loaded from {owners[0]}: {e}") from e
        return self._loaded[id]

    def add(self, id: str, item: T) -> None:
        """Register `item` for this process; a taken id is refused."""
        if id in self.ids():
            raise UsageError(f"{self.noun} {id} is already registered")
        self._loaded[id] = item

    def items(self) -> list[tuple[str, T]]:
        """Return every (id, class), importing all of them."""
        return [(i, self.get(i)) for i in self.ids()]


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Return a hint with the three known words most like `word`, best first; None where nothing is known."""
    close = difflib.get_close_matches(word, known, 3, 0.0)
    return f"nearest: {', '.join(close)}" if close else None


PASSES: Registry[Any] = Registry("adaptc.passes", "pass")
CODECS: Registry[Any] = Registry("adaptc.codecs", "codec")
FORMATS: Registry[Any] = Registry("adaptc.formats", "dialect", hidden=("refused",))
