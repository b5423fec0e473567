"""All adapters of a model in one pool of pages, for the kernels that run a mixed batch in one launch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.kernels.pool import PAGE, Batch, Pool, batch
from adaptc.kernels.resident import WORD, Resident
from adaptc.kernels.runtime_branch import Low
from adaptc.kernels.runtime_layer import Layer

_HALVES = (torch.float16, torch.bfloat16)


class Paged:
    """The residents of every layer in one pool, and for each layer the batch of the selection that ran last."""

    def __init__(self, layers: Iterable[Layer], device: torch.device) -> None:
        found = {
            (layer.site.name, name): low
            for layer in layers for name in layer.branches if (low := single(layer, name)) is not None
        }
        parts = [low.parts[0] for low in found.values()]
        need = [pages(part) for part in parts]
        halves = {part.q.dtype for part in parts if not part.packed}
        self.device = device
        self.pool = Pool(max(1, sum(need)), max(1, len(need)), device, next(iter(halves), torch.float16),
                         max(need, default=1))
        self.lows = found
        self.slots: Mapping[tuple[str, str], int] = {
            key: self.pool.put(low.parts[0].to(device), low.scale) for key, low in found.items()}
        self.batches: dict[str, tuple[Any, int, Batch]] = {}

    def rows(self, layer: Layer, groups: list[tuple[str, float, Tensor]], selection: Any, rows: int) -> Batch | None:
        """Return the batch of a layer for `rows` rows of x, None where one of the adapters is not paged."""
        name = layer.site.name
        if any((name, adapter) not in self.slots for adapter, _, _ in groups):
            return None
        held = self.batches.get(name)
        if held is None or held[0] is not selection or held[1] != rows:
            each = torch.full((selection.rows,), -1)
            for adapter, scale, at in groups:
                slot = self.slots[name, adapter]
                each[at.cpu()] = slot
                self.pool.scales[slot] = self.lows[name, adapter].scale * scale
            flat = each.repeat_interleave(rows // selection.rows).tolist()
            held = self.batches[name] = (selection, rows, batch(flat, self.device))
        return held[2]


def single(layer: Layer, name: str) -> Low | None:
    """Return the adapter's only branch at a layer where the pool can hold it unrounded: one low-rank resident."""
    branches = layer.branches[name]
    if name in layer.gains or len(branches) != 1 or not isinstance(low := branches[0], Low) or len(low.parts) != 1:
        return None
    part = low.parts[0]
    others = {p.q.dtype for each in layer.branches.values() for b in each if isinstance(b, Low) for p in b.parts}
    mixed = len(others & set(_HALVES)) > 1
    return low if part.packed or (part.q.dtype in _HALVES and not mixed) else None


def pages(part: Resident) -> int:
    """Return the pages that `Pool.put` takes for a resident."""
    (m, n), (tq, tp) = part.shape, part.core.shape
    each = WORD if part.packed else 1
    return tq // each * -(-n // PAGE) + tp // each * -(-m // PAGE) + tq // WORD * (tp // WORD)
