"""Weights that bitsandbytes stored in 4 or 8 bits, as plain tensors; without bitsandbytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, UnsupportedError

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)  # never weights without scales beside them


class Dequantised(Mapping[str, Tensor]):
    """A checkpoint's parameters with those that bitsandbytes quantised decoded when they are asked for.

    4 bits (nf4, fp4): value = quant_map[code] * absmax[block of `blocksize`], the code of an even entry in the high
    half of its byte; absmax may itself be 8-bit codes, nested_quant_map[code] * nested_absmax[block] + nested_offset.
    8 bits: value = weight * SCB[row] / 127. Both as bitsandbytes decodes them, in the dtype the state names (8 bits:
    float32). Everything else is passed on; a parameter in a form that needs scales from elsewhere is refused.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored
        self._states = {name.partition(_STATE)[0]: name for name in stored if _STATE in name}
        parts = {f"{w}.{p}" for w in self._states for p in _PARTS} | set(self._states.values())
        parts |= {name for name in stored if name.rpartition(".")[2] in ("SCB", "weight_format")}
        self._names = [name for name in stored if name not in parts]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._states:
            return self._four_bits(name)
        w = self._stored[name]
        stem = name.rpartition(".")[0]
        if w.dtype == torch.int8 and f"{stem}.SCB" in self._stored:
            rows = self._stored[f"{stem}.SCB"].float()
            if w.dim() != 2 or rows.shape != (len(w),):
                raise FormatError(f"{name}: 8-bit weight has shape {tuple(w.shape)}, SCB {tuple(rows.shape)}")
            return w.float() * (rows / 127)[:, None]
        if w.dim() > 1 and w.dtype in _CODES:
            raise UnsupportedError(f"{name}: base weight is stored as {str(w.dtype)[6:]} without scales that are known",
                                   hint="bitsandbytes (4 and 8 bits) and GGUF are decoded; else use the original model")
        return w

    def _four_bits(self, name: str) -> Tensor:
        state = _state(name, self._stored[self._states[name]])
        try:
            shape, block, dtype = tuple(state["shape"]), int(state["blocksize"]), _DTYPES[state["dtype"]]
            absmax = self._absmax(name, state)
            levels = self._stored[f"{name}.quant_map"].float()
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(f"{name}: 4-bit state is incomplete ({e})") from e
        packed, n = self._stored[name].reshape(-1), math.prod(shape)
        if packed.dtype != torch.uint8:
            packed = packed.view(torch.uint8)  # quant_storage may be any dtype; the bytes are what counts
        if packed.numel() != (n + 1) // 2 or block < 1 or absmax.numel() != -(-n // block) or levels.numel() != 16:
            parts = f"{packed.numel()} bytes, {absmax.numel()} scales and {levels.numel()} levels"
            raise FormatError(f"{name}: {parts} are no 4-bit weight of shape {shape} in blocks of {block}")
        codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
        scales = absmax.repeat_interleave(block)[:n]
        return (levels[codes.long()] * scales).reshape(shape).to(dtype)

    def _absmax(self, name: str, state: Mapping[str, Any]) -> Tensor:
        absmax = self._stored[f"{name}.absmax"]
        if absmax.dtype != torch.uint8:
            return absmax.float()
        outer, levels = self._stored[f"{name}.nested_absmax"].float(), self._stored[f"{name}.nested_quant_map"].float()
        block = int(state["nested_blocksize"])
        if levels.numel() != 256 or block < 1 or outer.numel() != -(-absmax.numel() // block):
            raise FormatError(f"{name}: {outer.numel()} nested scales do not cover {absmax.numel()} blocks by {block}")
        scales = outer.repeat_interleave(block)[: absmax.numel()]
        return levels[absmax.long()] * scales + float(state["nested_offset"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _state(name: str, stored: Tensor) -> dict[str, Any]:
    try:
        value = json.loads(bytes(stored.reshape(-1).tolist()))
    except (ValueError, TypeError) as e:
        raise FormatError(f"{name}: 4-bit state is not JSON") from e
    if not isinstance(value, dict):
        raise FormatError(f"{name}: 4-bit state is not a JSON object")
    return value
