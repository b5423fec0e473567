"""Dialects whose tools read torch.save files and little else."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.formats.format import Content, Format, TensorsFile, history_metadata
from adaptc.tensorfile import write_tensors


class TorchFile(Format):
    """A dialect that is one torch.save file, or a safetensors file where the output is called so."""

    suffix: ClassVar[str] = ".pt"

    @abstractmethod
    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return what is written, by file key."""

    def wrapper(self, adapter: Adapter) -> str | None:
        """Return the key the tensors lie under, None where they are the top level."""
        return None

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the torch.save file."""
        return {"": torch_bytes(self.tensors(adapter), self.wrapper(adapter))}

    def write(self, adapter: Adapter, out: Path) -> None:
        """Write one file, safetensors by its suffix, torch.save else."""
        if out.suffix != ".safetensors":
            super().write(adapter, out)
            return
        file = TensorsFile(self.tensors(adapter), {**adapter.origin.metadata, **history_metadata(adapter)})
        with out.open("wb") as f:
            write_tensors(f, file.tensors, file.metadata)


def torch_bytes(tensors: Mapping[str, Tensor], wrapper: str | None = None) -> bytes:
    """Return a torch.save file of the tensors by key, one level down under `wrapper` if given.

    Tensors on the meta device count as zeros: sizes do not depend on values.
    """
    plain = {k: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.detach().cpu().contiguous().clone()
             for k, t in tensors.items()}
    payload: dict[str, Any] = {wrapper: plain} if wrapper else plain
    out = io.BytesIO()
    torch.save(payload, out)
    return out.getvalue()
