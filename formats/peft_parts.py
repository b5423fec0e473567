"""What every reader of a PEFT type shares: the result, and the checks that keep half adapters out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.delta import Delta
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import Factor, decoded


@dataclass
class Read:
    """What tuned modules became: parameter name -> delta, replacements, layout marks, carried state, notes.

    `names`: parameter name -> key (without PEFT's prefix) of replacements whose key is another.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    layout: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def take(module: str, tensors: Mapping[str, Tensor], names: Collection[str], optional: Collection[str] = ()
         ) -> list[Tensor]:
    """Return the tensors of a module in the order of `names`.

    Raises FormatError for a missing or empty one, UnsupportedError for a parameter that is not known.
    """
    for name, t in tensors.items():
        if name not in names and name not in optional:
            raise UnsupportedError(f"{module}.{name}: not a known parameter of this type")
        if t.numel() == 0:
            raise FormatError(f"{module}.{name}: shape {tuple(t.shape)}, a shard that was not gathered")
    missing = [n for n in names if n not in tensors]
    if missing:
        raise FormatError(f"{module}: {missing[0]} is missing, half an adapter")
    return [tensors[n] for n in names]


def pair(module: str, tensors: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return both halves of a pair. Raises FormatError for half a pair and for shards that were never gathered."""
    for have, miss in ((first, second), (second, first)):
        if have in tensors and miss not in tensors:
            raise FormatError(f"{module}: {have} has no {miss}, half an adapter")
    if first not in tensors:
        raise FormatError(f"{module}: {first} is missing")
    for name in (first, second):
        t = tensors[name]
        if t.numel() == 0 or t.dim() < 2:
            raise FormatError(f"{module}.{name}: shape {tuple(t.shape)}, a ZeRO-3 or FSDP shard that was not gathered")
        if not t.dtype.is_floating_point:
            raise FormatError(f"{module}.{name}: dtype {str(t.dtype)[6:]} holds codes, not factors")
    return tensors[first], tensors[second]


def expect(module: str, name: str, t: Tensor, *shape: int | None) -> None:
    """Raise FormatError unless `t` has this shape; None stands for any size."""
    if t.dim() != len(shape) or any(want not in (None, have) for have, want in zip(t.shape, shape, strict=True)):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise FormatError(f"{module}.{name}: shape {tuple(t.shape)}, expected ({wanted})")


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a switch of the config, its default where it is absent or null."""
    value = config.get(name)
    return default if value is None else bool(value)


def factor(f: Factor) -> Tensor:
    """Return a factor as a tensor of a dtype that files store: float64 becomes float32."""
    t = decoded(f)
    return t.float() if t.dtype == torch.float64 else t
