"""The change that fine-tuning made to a whole model, weight by weight, as deltas that are read in row blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.base import Base
from adaptc.delta import Delta, Dense
from adaptc.errors import AdaptcError, FormatError
from adaptc.factor import Encoded

SMALL = 1 << 20  # entries of a tensor that is carried whole where it has no matrix to differ from
_BLOCK = 1 << 22


class Difference(Encoded):
    """W' - W0 of two stored weights in logical orientation, made some rows at a time."""

    __slots__ = ()

    @classmethod
    def of(cls, tuned: Tensor, base: Tensor) -> Difference:
        """Return the difference of two weights of one shape, which stay where they are."""
        return cls("difference", {}, {"tuned": tuned, "base": base}, tuned.shape, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the tuned weight."""
        return self.streams["tuned"].nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop - 1 (rows, n): the difference in float64, which is exact for what models store."""
        tuned, base = (self.streams[k][start:stop].double() for k in ("tuned", "base"))
        return (tuned - base).reshape(stop - start, -1)

    def decode(self) -> Tensor:
        """Return the whole difference, float64."""
        return self.rows(0, self.shape[0]).reshape(self.shape)


@dataclass(frozen=True)
class Change:
    """What fine-tuning changed: an adapter with a dense delta a weight, and what it has no place for."""

    adapter: Adapter
    lost: tuple[str, ...]


def is_model(path: Path, base: Base | None) -> bool:
    """Return whether `path` holds a whole model and no adapter: its config, or mostly weights that `base` has."""
    if path.is_dir():
        weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        return weights and (path / "config.json").is_file() and not (path / "adapter_config.json").exists()
    if base is None or not path.is_file():
        return False
    try:
        names = list(Base(path))
    except AdaptcError:
        return False
    return 2 * sum(base.name_of(name) is not None for name in names) > len(names) > 0


def extracted(tuned: Base, base: Base) -> Change:
    """Return what turns `base` into `tuned`. Nothing is read twice but to see whether it changed at all.

    Matrices and kernels become deltas; other tensors that changed, and small ones that the base lacks, replace theirs.
    Raises FormatError where the two share no weight or none differs.
    """
    deltas: dict[str, Delta] = {}
    replaced: dict[str, Replacement] = {}
    lost, shared = [], 0
    for name in tuned:
        new = _logical(tuned, name)
        if not new.is_floating_point():
            continue
        old = _logical(base, name) if base.name_of(name) is not None else None
        shared += old is not None
        if old is not None and old.shape == new.shape:
            if _equal(new, old):
                continue
            if new.dim() >= 2:
                deltas[name] = Dense(Difference.of(new, old), 1.0, tuple(new.shape))
                continue
        if new.numel() > SMALL:
            had = "nothing" if old is None else f"shape {tuple(old.shape)}"
            lost.append(f"{name}: shape {tuple(new.shape)}, where the base has {had}")
        else:
            replaced[name] = tuned[name].contiguous()
    if not shared:
        raise FormatError(f"no weight of {tuned.path} is in {base.path}", hint="--base is another model")
    if not deltas:
        raise FormatError(f"no matrix of {tuned.path} differs from {base.path}")
    return Change(Adapter(deltas, replaced, Origin("peft", base_model=_name(base), notes=_NOTES)), tuple(lost))


_NOTES = ("extracted from a fine-tuned model",)


def _name(base: Base) -> str | None:
    name: Any = base.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not name.startswith("/") else None


def _logical(model: Base, name: str) -> Tensor:
    """Return a weight in logical orientation (out, in, ...)."""
    w = model[name]
    return model.weight(name, (0,) * w.dim()) if w.dim() >= 2 else w


def _equal(new: Tensor, old: Tensor) -> bool:
    if new.dim() < 2:
        return torch.equal(new.double(), old.double())
    step = max(1, _BLOCK * new.shape[0] // max(new.numel(), 1))
    return all(torch.equal(new[i : i + step].double(), old[i : i + step].double())
               for i in range(0, new.shape[0], step))
