"""The portable container: one safetensors file for any adapter, specified in docs/format.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from adaptc.adapter import Adapter
from adaptc.errors import FormatError
from adaptc.formats.format import Content, Evidence, Format, TensorsFile
from adaptc.formats.portable_manifest import MANIFEST
from adaptc.formats.portable_read import read_adapter
from adaptc.formats.portable_write import manifest_and_tensors
from adaptc.formats.source import Source
from adaptc.tensorfile import TensorFile

FILE = "adapter.adaptc.safetensors"


class Portable(Format):
    """Read and write the container. It loses nothing: whatever an Adapter holds has a place in it."""

    id: ClassVar[str] = "adaptc"
    title: ClassVar[str] = "adaptc container"
    writes: ClassVar[str] = "folder"
    suffix: ClassVar[str] = ".adaptc.safetensors"

    def sniff(self, source: Source) -> Evidence | None:
        """The manifest in the metadata."""
        return Evidence(4, "metadata holds an adaptc manifest") if MANIFEST in source.metadata else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; joint codes stay encoded, other payloads stay mapped."""
        if not isinstance(source.payload, TensorFile):
            raise FormatError(f"{source.file.name}: not a safetensors file")
        return read_adapter(source.payload, source.file.name, source.files)

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter as it is."""
        return adapter

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Nothing is lost."""
        return ()

    def bare(self, adapter: Adapter) -> Content:
        """Return the one file."""
        manifest, tensors = manifest_and_tensors(adapter)
        return TensorsFile(tensors, {MANIFEST: json.dumps(manifest, separators=(",", ":"))})

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the file and a config that makes stock PEFT stop instead of running the base model alone."""
        guard: dict[str, Any] = {"peft_type": "ADAPTC", "base_model_name_or_path": adapter.origin.base_model,
                                 "adaptc": f"{FILE} holds this adapter; adaptc decode writes it for PEFT"}
        return {FILE: self.bare(adapter), "adapter_config.json": (json.dumps(guard, indent=2) + "\n").encode()}


def without_container(adapter: Adapter) -> Adapter:
    """Return the adapter marked to be written in its original dialect."""
    return replace(adapter, origin=replace(adapter.origin, container=""))

