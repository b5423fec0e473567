"""Source: what the user named, opened once: the tensor file, the JSON beside it, its metadata. Nothing is executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import AdaptcError, FormatError, UnsupportedError, UsageError
from adaptc.tensorfile import TensorFile

# Names that tell which of several files in a folder is the adapter, best first.
KNOWN_FILES = (
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin", "adapter_model.pt", "adapter_0.pt", "lit_model.pth.lora",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf", ".lora", ".onnx_adapter", ".ckpt")
# Files that lie beside adapters and never are one.
_NOT_ADAPTERS = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "tokenizer", "decoded", "output",
                 "ref.pt")


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
        with self.file.open("rb") as f:
            return f.read(16)

    @cached_property
    def payload(self) -> Any:
        """What the file holds: a mapping of tensors, or for old pickles whatever plain structure they store."""
        if not self.file.stat().st_size:
            raise FormatError(f"{self.file.name}: file is empty")
        if self.magic[:4] == b"PK\x03\x04" and self.file.suffix == ".npz":
            return _npz(self.file)
        if self.magic[:2] == b"PK" or self.magic[:1] == b"\x80":
            return _pickle(self.file)
        if self.file.suffix == ".safetensors" or self.magic[8:9] == b"{":
            return TensorFile(self.file)
        return {}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by file key; empty where the payload is no mapping of tensors."""
        held = self.payload
        if isinstance(held, TensorFile):
            return held
        if isinstance(held, Mapping) and all(isinstance(v, Tensor) for v in held.values()):
            return {str(k): v for k, v in held.items()}
        return {}

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
    path = Path(path)
    if not path.exists():
        path = _from_hub(str(path))
    try:
        file = _pick(path) if path.is_dir() else path
        folder = path if path.is_dir() else path.parent
        config_file = folder / "adapter_config.json"
        beside = path.is_dir() or file.name in KNOWN_FILES or file.name.endswith("_adapters.safetensors")
        config = _json(config_file) if beside and config_file.is_file() else {}
        return Source(folder if config and not path.is_dir() else path, file, config, alpha)
    except OSError as e:
        raise AdaptcError(f"{path}: {e.strerror or e}") from e


def _pick(folder: Path) -> Path:
    for name in KNOWN_FILES:
        if (folder / name).is_file():
            return folder / name
    found = [p for p in sorted(folder.iterdir()) if p.suffix in _SUFFIXES and p.is_file()
             and not p.name.startswith(_NOT_ADAPTERS)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"{folder} holds no adapter file", hint=f"looked for {', '.join(KNOWN_FILES[:4])} and others")
    raise UsageError(f"{folder} holds {len(found)} files that could be the adapter: "
                     f"{', '.join(p.name for p in found[:4])}", hint="name one of them")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path.name} is not JSON") from e
    if not isinstance(config, dict):
        raise FormatError(f"{path.name} is not a JSON object")
    return config


def _pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=path.read_bytes()[:2] == b"PK" or None)
    except pickle.UnpicklingError as e:
        raise UnsupportedError(f"{path.name}: pickle wants to run code, refused",
                               hint="ask its author for safetensors") from e
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise FormatError(f"{path.name}: truncated or not a torch file") from e


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: torch.from_numpy(np.ascontiguousarray(z[k])) for k in z.files}
    except (ValueError, OSError, EOFError, TypeError, KeyError) as e:
        raise FormatError(f"{path.name}: not a plain npz archive of arrays") from e
    except Exception as e:  # zipfile's own errors derive from Exception only
        if type(e).__name__ == "BadZipFile":
            raise FormatError(f"{path.name}: truncated npz archive") from e
        raise


def _from_hub(name: str) -> Path:
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or ".." in parts or name.endswith(_SUFFIXES):
        raise UsageError(f"{name} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UsageError(f"{name} does not exist here, and Hub ids need huggingface_hub",
                         hint="pip install 'adaptc[hub]'") from e
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.npz", "*.pt"]))
    except Exception as e:  # the library raises a dozen types for offline, missing and forbidden
        raise UsageError(f"{name} does not exist here and could not be fetched from the Hub: {type(e).__name__}",
                         hint="check the name and the connection; gated repositories need `hf auth login`") from e
