"""Source: what the user named, opened once: the tensor file, the JSON beside it, its metadata. Nothing is executed."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.formats.config_json import read_config
from adaptc.formats.payload import load_npz, load_pickle, tensors_of
from adaptc.hub import fetch, is_hub_id
from adaptc.tensorfile import TensorFile

# Names that tell which of several files in a folder is the adapter, best first.
KNOWN_FILES = (
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin", "adapter_model.pt", "adapter_0.pt", "lit_model.pth.lora",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf", ".lora", ".onnx_adapter", ".ckpt")
# torchtune writes its own adapter file beside a PEFT export, whose config says nothing about the former's keys.
_TORCHTUNE = re.compile(r"adapter_\d+\.(pt|safetensors)")
# Files that lie beside adapters and never are one.
_NOT_ADAPTERS = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "tokenizer", "decoded",
                 "output", "ref.pt")


@dataclass(frozen=True)
class Source:
    """An opened input. `path` is what was named, `file` the tensor file, `config` the JSON beside it ({} if none)."""

    path: Path
    file: Path
    config: Mapping[str, Any]
    alpha: float | None = None

    @cached_property
    def magic(self) -> bytes:
        """First 16 bytes of the tensor file."""
        try:
            with self.file.open("rb") as f:
                return f.read(16)
        except OSError as e:
            raise AdaptcError(f"{self.file}: {e.strerror or e}") from e

    @cached_property
    def payload(self) -> Any:
        """What the file holds: a mapping of tensors, or for old pickles whatever plain structure they store."""
        try:
            return self._load()
        except OSError as e:
            raise AdaptcError(f"{self.file}: {e.strerror or e}") from e

    def _load(self) -> Any:
        size = self.file.stat().st_size
        if not size:
            raise FormatError(f"{self.file.name}: file is empty")
        head = self.magic
        if head[:4] == b"PK\x03\x04":
            return load_npz(self.file) if self.file.suffix == ".npz" else load_pickle(self.file)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
            return TensorFile(self.file)
        if head[:1] == b"\x80" and head[1:2] <= b"\x05":  # a pickle's first opcode and its protocol
            return load_pickle(self.file)
        if self.file.suffix == ".safetensors":
            return TensorFile(self.file)
        if self.file.suffix == ".npz":
            raise FormatError(f"{self.file.name}: no npz archive")
        return {}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by file key; empty where the payload is no mapping of tensors."""
        return self.payload if isinstance(self.payload, TensorFile) else tensors_of(self.payload, self.file.name)

    @property
    def metadata(self) -> Mapping[str, str]:
        """safetensors metadata, {} for other files."""
        return self.payload.metadata if isinstance(self.payload, TensorFile) else {}

    @property
    def folder(self) -> bool:
        """Whether the user named a folder (or a file that only means something with its folder)."""
        return self.path.is_dir()

    @property
    def files(self) -> dict[str, int]:
        """Names and sizes of the files that were read."""
        return {self.file.name: self.file.stat().st_size}


def open_source(path: str | Path, *, alpha: float | None = None) -> Source:
    """Open a file, a folder or a Hub id. Raises UsageError if there is nothing there, FormatError if it is damaged."""
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        raise UsageError(f"alpha is {alpha}, must be a number other than 0")
    if "\0" in str(path):
        raise UsageError("the input's name holds a NUL character")
    path = Path(path)
    try:
        if not path.exists():
            path = _from_hub(str(path))
        file = _pick(path) if path.is_dir() else path
        if not stat.S_ISREG(file.stat().st_mode):
            raise UsageError(f"{file} is no regular file")
        folder = path if path.is_dir() else path.parent
        config_file = folder / "adapter_config.json"
        beside = path.is_dir() or file.name in KNOWN_FILES or file.name.endswith("_adapters.safetensors")
        mine = beside and not _TORCHTUNE.fullmatch(file.name) and config_file.is_file()
        config = read_config(config_file) if mine else {}
        return Source(folder if config and not path.is_dir() else path, file, config, alpha)
    except OSError as e:
        raise AdaptcError(f"{e.filename or path}: {e.strerror or e}") from e


def could_be_adapter(name: str) -> bool:
    """Return whether a file of this name may hold an adapter: a known suffix, and not what lies beside adapters."""
    return name.endswith(_SUFFIXES) and not name.startswith(_NOT_ADAPTERS)


def _pick(folder: Path) -> Path:
    for name in KNOWN_FILES:
        if (folder / name).is_file():
            return folder / name
    found = [p for p in sorted(folder.iterdir()) if could_be_adapter(p.name) and p.is_file()]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"{folder} holds no adapter file", hint=f"looked for {', '.join(KNOWN_FILES[:4])} and others")
    raise UsageError(f"{folder} holds {len(found)} files that could be the adapter: "
                     f"{', '.join(p.name for p in found[:4])}", hint="name one of them")


def _from_hub(name: str) -> Path:
    if not is_hub_id(name, _SUFFIXES):
        raise UsageError(f"{name} does not exist")
    return fetch(name, ("*.json", "*.safetensors", "*.bin", "*.npz", "*.pt"))
