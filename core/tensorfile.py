"""TensorFile: a safetensors file, checked whole before anything is allocated, read by mapping; and its writer."""

from __future__ import annotations

import json
import math
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adaptc.errors import FormatError

MAX_HEADER = 100_000_000
MAX_DIMS = 32
MAX_NAME = 4096
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}
NAMES = {v: k for k, v in DTYPES.items()}


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a read-only mapping; tensors are views of the mapped file, nothing is copied.

    The header is checked whole first: length, JSON without duplicate keys, names, dtypes, shapes against byte ranges,
    ranges without holes or overlaps, and the file's size. Raises FormatError with the numbers that disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise FormatError(f"{path.name}: truncated, a safetensors file has 8 bytes of length, this has {size}")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER:
                raise FormatError(f"{path.name}: header claims {length} bytes, the limit is {MAX_HEADER}")
            if 8 + length > size:
                raise FormatError(f"{path.name}: truncated, header promises {8 + length} bytes, file has {size}")
            raw = f.read(length)
        header = _parse(raw, path.name)
        self.metadata = _metadata(header.pop("__metadata__", {}), path.name)
        self.info: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name, entry in header.items():
            self.info[name] = _entry(name, entry, path.name)
        self._start = 8 + length
        # A container's payload is useful in part: the last tensor may be cut short, `cut` names it.
        last = max(self.info, key=lambda n: self.info[n][3], default="")
        short = "adaptc" in self.metadata and last.startswith("payload.") and self.info[last][0] == "U8"
        self.cut: str | None = None
        if short and self.info[last][2] <= size - self._start < self.info[last][3]:
            self.cut = last
            self.info[last] = ("U8", (size - self._start - self.info[last][2],), self.info[last][2], size - self._start)
        _check_ranges(self.info, size - self._start, path.name)
        self._mapped: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        dtype_name, shape, begin, end = self.info[name]
        dtype = DTYPES[dtype_name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        if self._mapped is None:  # private mapping: pages are shared with the file until somebody writes to them
            size = self.path.stat().st_size
            self._mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        flat = self._mapped[self._start + begin : self._start + end]
        if (self._start + begin) % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def nbytes(self, name: str) -> int:
        """Return the stored bytes of one tensor without touching it."""
        return self.info[name][3] - self.info[name][2]


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return unique(pairs, f"{file}: header")

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)  # bytes would be taken for UTF-16 too
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{file}: header is not JSON") from e
    if not isinstance(header, dict):
        raise FormatError(f"{file}: header is not a JSON object")
    for name in header:
        check_name(name, file)
    return header


def unique(pairs: list[tuple[str, Any]], where: str = "manifest") -> dict[str, Any]:
    """Return a JSON object of `pairs`. Raises FormatError for a key that is there twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise FormatError(f"{where} names {twice[:60]!r} twice")
    return out


def check_name(name: str, file: str) -> None:
    """Raise FormatError unless `name` is usable as a tensor name: not empty, not huge, no control characters."""
    if not name or len(name) > MAX_NAME:
        raise FormatError(f"{file}: a tensor name has {len(name)} characters, allowed are 1 to {MAX_NAME}")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise FormatError(f"{file}: tensor name {name!r} holds control characters")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:  # MLX writes null
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{file}: metadata is not a map of strings")
    try:
        "".join((*value, *value.values())).encode()
    except UnicodeEncodeError as e:
        raise FormatError(f"{file}: metadata holds half a surrogate pair") from e
    return value


def _entry(name: str, entry: Any, file: str) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise FormatError(f"{file}: header entry of {name!r} is not dtype, shape and data_offsets") from e
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{file}: {name!r} has dtype {dtype!r}, which is not readable here")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise FormatError(f"{file}: {name!r} has a shape that is no list of at most {MAX_DIMS} dimensions")
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in (*shape, begin, end)):
        raise FormatError(f"{file}: {name!r} has shape {shape} and offsets {begin}, {end}, not all whole and positive")
    if math.prod(d for d in shape if d) >= 2**63:  # even beside a zero: torch multiplies strides out
        raise FormatError(f"{file}: {name!r} has shape {shape}, more entries than 63 bits count")
    need = DTYPES[dtype].itemsize * math.prod(shape)
    if end - begin != need:
        raise FormatError(f"{file}: {name!r} is {dtype} {shape}, {need} bytes, but its offsets span {end - begin}")
    return dtype, tuple(shape), begin, end


def _check_ranges(info: Mapping[str, tuple[str, tuple[int, ...], int, int]], size: int, file: str) -> None:
    at = 0
    for name, (_, _, begin, end) in sorted(info.items(), key=lambda kv: (kv[1][2], kv[1][3])):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise FormatError(f"{file}: {name!r} {what}: starts at {begin}, expected {at}")
        at = end
    if at > size:
        raise FormatError(f"{file}: truncated, header promises {at} bytes of tensors, file has {size}")
    if at < size:
        raise FormatError(f"{file}: {size - at} bytes after the last tensor belong to nothing")


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return the 8-byte length plus padded JSON header of a safetensors file, and the order of its tensors.

    Order: widest dtype first, then by name, as the reference writer does; padded with spaces to 8 bytes. Only shapes
    and dtypes are looked at, so tensors may be on the meta device: file size = len(header) + sum of nbytes.
    """
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def write_tensors(out: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to an open binary file, one tensor at a time."""
    header, order = header_of(tensors, metadata)
    out.write(header)
    for name in order:
        t = tensors[name].detach().cpu().contiguous()
        if t.numel():
            out.write(t.reshape(-1).view(torch.uint8).numpy().data)
