"""The header of a GGUF file: its facts and where its tensors lie, without the tokenizer's lists."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.errors import FormatError

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's shape (slowest dimension first), ggml type number, and where its bytes begin in `path`."""

    path: Path
    shape: tuple[int, ...]
    type: int
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """Scalar facts by key ("general.architecture", "llama.block_count", ...) and tensors by GGUF name."""

    facts: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, versions 2 and 3, little-endian; lists among the facts are stepped over.

    The gguf package's reader makes an object of every token, seconds for a small model. Raises FormatError for a file
    that is damaged or of another version.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError) as e:
        raise FormatError(f"{path.name}: damaged GGUF header ({e})") from e


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        magic, version, tensors, facts = struct.unpack_from("<4sIQQ", self._data)
        if magic != b"GGUF" or version not in _VERSIONS:
            raise FormatError(f"{self._path.name}: GGUF version {version}, readable are little-endian 2 and 3")
        self._at = 24
        found: dict[str, Any] = {}
        for _ in range(facts):
            key, kind = self._text(), self._number("<I")
            value = self._value(kind)
            if kind != _ARRAY:
                found[key] = value
        infos = []
        for _ in range(tensors):
            name, dims = self._text(), self._number("<I")
            if dims > 8:
                raise ValueError(f"tensor {name[:60]!r} has {dims} dimensions")
            infos.append((name, [self._number("<Q") for _ in range(dims)], self._number("<I"), self._number("<Q")))
        step = found.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"alignment is {step}")
        start = -(-self._at // step) * step
        made = {n: GgufTensor(self._path, tuple(reversed(s)), t, start + o) for n, s, t, o in infos}
        if len(made) != tensors:
            raise ValueError(f"{tensors - len(made)} tensors have the name of another")
        return GgufHeader(found, made)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _skip(self, count: int) -> int:
        begin, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError(f"it promises {self._at} bytes, the file has {len(self._data)}")
        return begin

    def _text(self) -> str:
        length = self._number("<Q")
        begin = self._skip(length)
        return self._data[begin : begin + length].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        inner, count = self._number("<I"), self._number("<Q")
        if inner in (_STRING, _ARRAY):
            for _ in range(count):  # ends at the end of the file at the latest: every entry takes 8 bytes or more
                self._skip(self._number("<Q")) if inner == _STRING else self._value(_ARRAY)
        else:
            self._skip(count * struct.calcsize(_NUMBERS[inner]))
        return None


def stored_nbytes(tensor: GgufTensor, block: int, nbytes: int) -> int:
    """Return the bytes of a tensor stored in blocks of `block` values, `nbytes` bytes each.

    Raises FormatError where its rows are no whole blocks or the file ends before it does.
    """
    values = math.prod(tensor.shape)
    if not tensor.shape or tensor.shape[-1] % block:
        raise FormatError(f"{tensor.path.name}: rows of shape {tensor.shape} are no whole blocks of {block}")
    need, size = values // block * nbytes, tensor.path.stat().st_size
    if tensor.begin + need > size:
        raise FormatError(f"{tensor.path.name}: truncated, a tensor ends at {tensor.begin + need}, the file at {size}")
    return need
