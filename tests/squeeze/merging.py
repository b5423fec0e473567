"""Small random adapters for the merging tests, and a dense view of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Delta, LowRank

KEY = "model.layers.0.self_attn.q_proj.weight"


def lora(m: int, n: int, r: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, n, generator=g, dtype=torch.float64), torch.randn(m, r, generator=g, dtype=torch.float64)
    b = b * torch.linspace(1.0, 0.2, r, dtype=torch.float64)
    return LowRank((a / n**0.5).to(dtype), (b / m**0.5).to(dtype), None, scale, (m, n))


def adapter(deltas: Mapping[str, Delta] | Delta, base: str | None = "org/model", **kw: object) -> Adapter:
    made = deltas if isinstance(deltas, Mapping) else {KEY: deltas}
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base,
              "target_modules": sorted({k.split(".")[-2] for k in made})}
    return Adapter(made, kw.pop("replaced", {}), Origin("peft", config, base_model=base), **kw)  # type: ignore[arg-type]


def inputs(m: int, n: int, ranks: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Adapter]:
    return [adapter(lora(m, n, r, seed=10 + i, scale=0.5 + i, dtype=dtype)) for i, r in enumerate(ranks)]


def dense(a: Adapter, key: str = KEY) -> np.ndarray:
    return a.deltas[key].dense().numpy()  # type: ignore[no-any-return]


def refactored(a: Adapter, seed: int) -> Adapter:
    """Return the same deltas with every pair of factors turned by a random invertible matrix (condition about 3)."""
    def turn(key: str, d: Delta) -> Delta:
        assert isinstance(d, LowRank)
        g = torch.Generator().manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(d.rank, d.rank, generator=g, dtype=torch.float64))
        p, _ = torch.linalg.qr(torch.randn(d.rank, d.rank, generator=g, dtype=torch.float64))
        turn = q * torch.linspace(0.6, 1.8, d.rank, dtype=torch.float64) @ p
        b, low = d.factors()
        return replace(d, b=b @ turn / 2.0, a=torch.linalg.solve(turn, low), scale=2.0)

    return a.map(turn)
