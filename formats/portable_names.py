"""Module names as templates: encoder.layer.{0-5}.attention.self.{query,key,value}.weight stands for 18 of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adaptc.errors import FormatError

_SPECIAL = re.compile(r"[{}\\]")
_BRACES = re.compile(r"\\(.)|\{([^{}]*)\}", re.DOTALL)


@dataclass
class Room:
    """How many names, of how many characters together, templates may still stand for.

    The limits are beyond any adapter (every expert of a trillion-parameter model apart has 70 000 modules) and keep a
    template of a few bytes from filling the memory.
    """

    names: int = 2**17
    characters: int = 2**25

    def take(self, names: int, longest: int) -> None:
        """Use up room for `names` names of at most `longest` characters. Raises FormatError where there is none."""
        self.names -= names
        self.characters -= names * longest
        if self.names < 0 or self.characters < 0:
            raise FormatError(f"manifest has more than {Room.names} module names or {Room.characters} characters of "
                              "them")


def pack_names(names: Sequence[str]) -> list[str]:
    """Return templates that `unpack_names` expands to the same set of distinct names.

    A template is a name whose dotted parts may be {a,b,c} or {0-11}; the last brace runs fastest. Braces and
    backslashes in names are escaped with a backslash. Use `unpack_names` on the result for the order they get.
    """
    by_length: dict[int, list[tuple[str, ...]]] = {}
    for name in names:
        parts = tuple(_SPECIAL.sub(lambda m: "\\" + m.group(), name).split("."))
        by_length.setdefault(len(parts), []).append(parts)
    return [template for group in by_length.values() for template in _product(group)]


def _product(group: list[tuple[str, ...]]) -> list[str]:
    """Split a set of equally long part tuples into full products of the values at each place."""
    values = [list(dict.fromkeys(parts[i] for parts in group)) for i in range(len(group[0]))]
    size = 1
    for v in values:
        size *= len(v)
    if size == len(group) and all(_sayable(v) for v in values):
        return [".".join(_brace(v) for v in values)]
    # Not a product: split where the fewest values vary, numbers last, so that layers stay together.
    place = min((i for i, v in enumerate(values) if len(v) > 1),
                key=lambda i: (all(x.isdigit() for x in values[i]), len(values[i])))
    out = []
    for value in values[place]:
        out += _product([parts for parts in group if parts[place] == value])
    return out


def _brace(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    if all(re.fullmatch(r"0|[1-9]\d*", v) for v in values):
        numbers = [int(v) for v in values]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(values) + "}"


def _sayable(values: list[str]) -> bool:
    """Return whether a set of parts can stand in braces: no comma, no escape, nothing that reads like a range."""
    return len(values) == 1 or not any(v == "" or "," in v or "\\" in v or "-" in v for v in values)


def unpack_names(templates: Iterable[str], room: Room | None = None) -> list[str]:
    """Return the names that templates stand for, in order.

    Raises FormatError for a malformed template, a name twice, or more than `room` holds.
    """
    room = room or Room()
    out: list[str] = []
    for template in templates:
        if not isinstance(template, str):
            raise FormatError(f"name template {str(template)[:60]!r} is not a string")
        out += _expand(template, room)
    if len(set(out)) != len(out):
        raise FormatError("manifest names a module twice")
    return out


def _expand(template: str, room: Room) -> list[str]:
    pieces: list[Sequence[str]] = []
    at = 0
    for found in _BRACES.finditer(template):
        choices = [found.group(1)] if found.group(1) else _choices(found.group(2))
        pieces += [[template[at : found.start()]], choices]
        at = found.end()
    pieces.append([template[at:]])
    if any(_SPECIAL.search(p) for p in (piece[0] for piece in pieces[::2])):
        raise FormatError(f"name template {template[:60]!r} has a brace that is not closed")
    room.take(math.prod(map(len, pieces)), sum(max(map(len, piece)) for piece in pieces))
    return ["".join(combination) for combination in itertools.product(*pieces)]


def _choices(body: str) -> Sequence[str]:
    ends = re.fullmatch(r"([0-9]{1,7})-([0-9]{1,7})", body)
    if ends is None:
        if "-" in body:
            raise FormatError(f"name template has {body[:40]!r} in braces, which is no range")
        return body.split(",")
    first, last = int(ends.group(1)), int(ends.group(2))
    if last < first or last - first >= Room.names:
        raise FormatError(f"name template has the empty or endless range {body!r}")
    return [str(i) for i in range(first, last + 1)]
