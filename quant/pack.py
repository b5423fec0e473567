"""Small unsigned codes in bytes, each packing beside its inverse: the first code in the low bits (little end first)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import FormatError


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (n,), each below 2^bits, as ceil(n bits / 8) bytes: code i takes bits i*bits .. (i+1)*bits - 1."""
    raw = codes.reshape(-1).numpy().astype(np.uint8)
    if bits == 8:
        return torch.from_numpy(raw.copy())
    planes = (raw[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def packed_nbytes(n: int, bits: int) -> int:
    """Return the bytes of n codes of `bits` bits."""
    return -(-n * bits // 8)


def unpack_codes(data: Tensor, bits: int, n: int) -> Tensor:
    """Return the n codes that `pack_codes` stored, uint8. Raises FormatError for too few or too many bytes."""
    if data.numel() != packed_nbytes(n, bits):
        raise FormatError(f"{data.numel()} bytes for {n} codes of {bits} bits, expected {packed_nbytes(n, bits)}")
    raw = data.numpy()
    if bits == 8:
        return data.clone()
    if 8 % bits == 0:  # whole codes in every byte: shifts instead of single bits
        parts = [(raw >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.from_numpy(np.stack(parts, -1).reshape(-1)[:n].copy())
    planes = np.unpackbits(raw, count=n * bits, bitorder="little").reshape(n, bits)
    return torch.from_numpy((planes << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8))
