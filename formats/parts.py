"""Parts: deltas of some rows of one parameter, as trainers of fused q/k/v projections store them.

The key of a part is "name.weight[start:stop]", rows start to stop of the parameter, and its layout "rows:total"; a part
whose rows the file does not tell is "name.weight[part i]" with layout "part". Passes treat parts like any other delta,
so each keeps its own rank; `joined` makes one delta a parameter of them, for dialects that know no parts.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from adaptc.adapter import Adapter
from adaptc.delta import Delta, LowRank
from adaptc.errors import UnsupportedError
from adaptc.factor import decoded

_PART = re.compile(r"(.+)\[(?:(\d+):(\d+)|part (\d+))\]")


def part_key(name: str, start: int, stop: int) -> str:
    """Return the key of rows start to stop of parameter `name`."""
    return f"{name}[{start}:{stop}]"


def split_part(key: str) -> tuple[str, int | None, int]:
    """Return (parameter, start, stop) of a part's key, (parameter, None, i) for rows unknown, (key, None, -1) else."""
    m = _PART.fullmatch(key)
    if m is None:
        return key, None, -1
    return (m[1], None, int(m[4])) if m[2] is None else (m[1], int(m[2]), int(m[3]))


def joined(adapter: Adapter) -> Adapter:
    """Return the adapter with the parts of each parameter put together, exactly: A stacked, B block by block.

    b (total, r1 + r2 + ...) is zero outside the rows of each part; differing scales are folded into b in float64.
    Raises UnsupportedError for parts whose rows are not known.
    """
    deltas: dict[str, Delta] = {}
    parts: dict[str, list[tuple[int, int, LowRank]]] = {}
    for key, delta in adapter.deltas.items():
        name, start, stop = split_part(key)
        if stop < 0:
            deltas[key] = delta
        elif start is None or not isinstance(delta, LowRank):
            raise UnsupportedError(f"{key}: the file does not tell which rows of {name} this changes",
                                   hint="keep the dialect it came in")
        else:
            deltas.setdefault(name, delta)  # its place in the order
            parts.setdefault(name, []).append((start, stop, delta))
    layout = {k: v for k, v in adapter.origin.layout.items() if split_part(k)[2] < 0}
    for name, some in parts.items():
        keys = [part_key(name, start, stop) for start, stop, _ in some]
        deltas[name] = _join(some, int(adapter.origin.layout[keys[0]].removeprefix("rows:")))
    return replace(adapter, deltas=deltas, origin=replace(adapter.origin, layout=layout)) if parts else adapter


def _join(parts: list[tuple[int, int, LowRank]], total: int) -> LowRank:
    scale = parts[0][2].scale
    wide = any(p.scale != scale or p.core is not None for _, _, p in parts)
    dtype = torch.promote_types(parts[0][2].dtype, torch.float32) if wide else parts[0][2].dtype
    b = torch.zeros(total, sum(p.rank for _, _, p in parts), dtype=dtype)
    at, a = 0, []
    for start, stop, p in parts:
        right = decoded(p.a)
        left = p.factors()[0] / (scale or 1.0) if wide else decoded(p.b)
        b[start:stop, at : at + right.shape[0]] = left.to(dtype)
        a.append(right)
        at += right.shape[0]
    return LowRank(torch.cat(a), b, None, scale, (total, a[0].shape[1]))
