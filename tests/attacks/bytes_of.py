"""Adapter files byte by byte, so that every one of their promises can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def ramp(*shape: int, seed: int = 1) -> Tensor:
    """Return small values without a pattern, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def good() -> dict[str, Tensor]:
    """Return one LoRA pair of rank 4 on a 12 x 16 weight."""
    return {f"{Q}.lora_A.weight": ramp(4, 16), f"{Q}.lora_B.weight": ramp(12, 4, seed=2)}


def entries(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Return the header entries and the data of a safetensors file."""
    header: dict[str, Any] = {}
    data = b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}
    for name, t in tensors.items():
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": span}
        data += raw
    return header, data


def pack(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    """Return a file: length, header (JSON of any value, or bytes as they are), data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def whole(tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """Return a sound safetensors file."""
    return pack(*entries(good() if tensors is None else tensors))


def folder(at: Path, file: bytes | None = None, config: Any = None, name: str = "adapter_model.safetensors") -> Path:
    """Write a PEFT folder and return it; `config` may be bytes, text or any JSON value."""
    made = at / "adapter"
    made.mkdir()
    (made / name).write_bytes(whole() if file is None else file)
    config = CONFIG if config is None else config
    text = config if isinstance(config, (bytes, str)) else json.dumps(config)
    (made / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return made


def patched(**changes: Any) -> dict[str, Any]:
    """Return the good config with fields changed."""
    return {**CONFIG, **changes}


def edited(edit: Any) -> bytes:
    """Return the good file after `edit(header)` changed its header in place."""
    header, data = entries(good())
    edit(header)
    return pack(header, data)
