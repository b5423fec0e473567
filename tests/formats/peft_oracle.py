"""Run a PEFT checkpoint against PEFT's own merge: base weights by name, and every merged parameter compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Rows
from adaptc.base import Base
from adaptc.errors import NeedsError
from adaptc.resolve import resolved

CONV1D = ("c1d.weight",)  # the toy model's transformers Conv1D, stored (in, out)


class Held(Base):
    """Base weights held in memory, with the classes that their shapes do not tell."""

    def __init__(self, tensors: Mapping[str, Tensor], conv1d: tuple[str, ...] = CONV1D) -> None:
        self._held, self.config, self.path, self._conv1d = tensors, {}, Path("held"), conv1d

    def name_of(self, key: str) -> str | None:
        return key if key in self._held else None

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._held:
            raise NeedsError(f"base has no parameter {key}")
        return self._held[key]

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        return self._held[key].T if key in self._conv1d else super().weight(key, shape)


def merged(adapter: Adapter, base: Mapping[str, Tensor], conv1d: tuple[str, ...] = CONV1D) -> dict[str, Tensor]:
    """Return every base parameter with the adapter applied, in float64 and the base's own orientation."""
    free = resolved(adapter, Held(base, conv1d))
    out = {name: w.double().clone() for name, w in base.items()}
    for name, value in free.replaced.items():
        assert name in out, f"{name} is no parameter of the base"
        if isinstance(value, Rows):
            out[name][list(value.indices)] = value.values.double()
        else:
            assert value.shape == out[name].shape
            out[name] = value.double()
    for name, delta in free.deltas.items():
        assert name in out, f"{name} is no parameter of the base"
        dw = delta.dense()
        dw = dw.T if name in conv1d else dw
        assert dw.numel() == out[name].numel()
        out[name] = out[name] + dw.reshape(out[name].shape)
    return out


def error(folder: Path) -> float:
    """Return the largest difference of any entry of any merged parameter, absolute or relative to the largest entry."""
    ref = torch.load(folder / "ref.pt", weights_only=True)
    made = merged(adaptc.load(folder), ref["base"])
    assert set(made) == set(ref["merged"])
    return distance(made, ref["merged"])


def distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """Return max |x - y| / max(1, max |y|) over all parameters of y."""
    return max(float((x[k].double() - w.double()).abs().max()) / max(1.0, float(w.abs().max())) for k, w in y.items())
