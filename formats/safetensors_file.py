"""Dialects that are one safetensors file, whatever older files of theirs were."""

from __future__ import annotations

from pathlib import Path

from adaptc.adapter import Adapter
from adaptc.errors import UsageError
from adaptc.formats.format import Format


class SafetensorsFile(Format):
    """A dialect that is read from torch.save files too, but written as safetensors only."""

    def write(self, adapter: Adapter, out: Path) -> None:
        """Write one file. Raises UsageError for a name that promises a torch.save file."""
        if out.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise UsageError(f"{out.name}: {self.title} files are written as safetensors, not {out.suffix}",
                             hint="name the output .safetensors, which every loader prefers")
        super().write(adapter, out)
