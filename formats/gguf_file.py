"""Tensors of a GGUF file in the types that adapters have, and whole files written."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.formats.gguf_types import BY_ID, BlockType
from adaptc.gguf_header import GgufTensor, stored_nbytes

ALIGNMENT = 32
_VERSION, _STRING, _U32, _F32 = 3, 8, 4, 6
Metadata: TypeAlias = Mapping[str, "str | int | float"]


def read_tensor(name: str, tensor: GgufTensor) -> Tensor:
    """Return a tensor decoded: float32, or the stored dtype of F32, F16 and BF16.

    Raises FormatError for a type that adaptc does not decode and for a file that ends early.
    """
    kind = BY_ID.get(tensor.type)
    if kind is None:
        raise FormatError(f"{tensor.path.name}: {name} has ggml type {tensor.type}, readable are "
                          f"{', '.join(t.name for t in BY_ID.values())}")
    nbytes = stored_nbytes(tensor, kind.block, kind.nbytes)
    data = np.fromfile(tensor.path, np.uint8, nbytes, offset=tensor.begin)
    rows = math.prod(tensor.shape[:-1])
    if not rows or not nbytes:
        return torch.empty(tensor.shape)
    return kind.decode(torch.from_numpy(data).reshape(rows, -1)).reshape(tensor.shape)


def gguf_bytes(metadata: Metadata, tensors: Mapping[str, tuple[Tensor, BlockType]]) -> bytes:
    """Return a GGUF file: uint8 tensors (rows, bytes of a row) with their types, aligned to 32 bytes.

    Metadata: strings, int as u32, float as f32.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _packed(key)
        if isinstance(value, str):
            out += struct.pack("<I", _STRING) + _packed(value)
        else:
            out += struct.pack("<II", _U32, value) if isinstance(value, int) else struct.pack("<If", _F32, value)
    at = 0
    for name, (data, kind) in tensors.items():
        rows, row = data.shape
        out += _packed(name) + struct.pack("<IQQIQ", 2, row // kind.nbytes * kind.block, rows, kind.id, at)
        at += -(-data.numel() // ALIGNMENT) * ALIGNMENT
    for data, _ in tensors.values():
        out += bytes(-len(out) % ALIGNMENT)
        out += data.contiguous().numpy().tobytes()
    return bytes(out + bytes(-len(out) % ALIGNMENT))


def _packed(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
