"""Modules of one kind in one line: parameter names with their layer numbers taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """Anything with a parameter name."""

    @property
    def key(self) -> str:
        """The parameter name."""


K = TypeVar("K", bound=Keyed)


def layer_type(key: str) -> str:
    """Return what kind of module a parameter is: "model.layers.3.self_attn.q_proj.weight" -> "self_attn.q_proj".

    The parts after the last layer number, at least two of them that are no number; numbers become "*".
    """
    parts = key.removesuffix(".weight").split(".")
    masked = ["*" if p.isdigit() else p for p in parts]
    end = len(masked)
    while end > 1 and masked[end - 1] == "*":  # an index at the very end ("to_out.0") is part of the kind
        end -= 1
    start = max((i + 1 for i in range(end) if masked[i] == "*"), default=0)
    while start > 0 and sum(p != "*" for p in masked[start:]) < 2:
        start -= 1
    return ".".join(masked[start:])


def grouped(items: Sequence[K], each: bool = False) -> dict[str, list[K]]:
    """Return items by layer type, in order of appearance; by full name where `each`, or where types save nothing."""
    names: Iterable[str] = (item.key if each else layer_type(item.key) for item in items)
    groups: dict[str, list[K]] = {}
    for name, item in zip(names, items, strict=True):
        groups.setdefault(name, []).append(item)
    if not each and len(groups) == len(items):
        return {item.key: [item] for item in items}
    return groups
