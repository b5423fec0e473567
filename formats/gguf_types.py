"""The tensor types of llama.cpp that adapters are written in: bytes of a row to values, and the best bytes for a row.

Layouts are ggml's. Scales are chosen by weighted least squares where ggml rounds to nearest: min sum w (x - d q)^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (blocks, block) values and the weights of their squares (None: all alike) -> (blocks, nbytes) uint8
Encode = Callable[[Tensor, "Tensor | None"], Tensor]
Decode = Callable[[Tensor], Tensor]
_TINY = 1e-12


@dataclass(frozen=True)
class BlockType:
    """A ggml type: its id, values a block, bytes a block, and the codec of (blocks, ...) arrays.

    `noise` is the share of the squares of normal values that its rounding loses.
    """

    name: str
    id: int
    block: int
    nbytes: int
    noise: float
    pack: Encode
    unpack: Decode

    @property
    def quantized(self) -> bool:
        """Whether several values share a scale."""
        return self.block > 1

    def encode(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return uint8 (rows, bytes of a row) for x (rows, n), n a multiple of `block`; `weights` (n,) of the squares.

        Raises ValueError where n is no multiple.
        """
        rows, n = x.shape
        if n % self.block:
            raise ValueError(f"{self.name} stores blocks of {self.block}, a row has {n} values")
        each = None
        if weights is not None and self.quantized:
            w = (weights / weights.amax().clamp(min=1e-300)).float().clamp(min=_TINY)
            each = w.reshape(-1, self.block).repeat(rows, 1)
        return self.pack(x.reshape(-1, self.block), each).reshape(rows, n // self.block * self.nbytes)

    def decode(self, raw: Tensor) -> Tensor:
        """Return the values (rows, n) of uint8 (rows, bytes of a row): float32, or the dtype that is stored."""
        return self.unpack(raw.reshape(-1, self.nbytes)).reshape(raw.shape[0], raw.shape[1] // self.nbytes * self.block)

    def row_bytes(self, n: int) -> int:
        """Return the bytes of a row of n values, a started block whole."""
        return -(-n // self.block) * self.nbytes


def _plain(name: str, id: int, dtype: torch.dtype) -> BlockType:
    def pack(x: Tensor, _: Tensor | None) -> Tensor:
        return x.to(dtype).contiguous().view(torch.uint8)

    return BlockType(name, id, 1, dtype.itemsize, 0.0, pack, lambda raw: raw.contiguous().view(dtype))


def _half(raw: Tensor) -> Tensor:
    """Return float32 (blocks, 1) of two bytes each."""
    return raw.contiguous().view(torch.float16).float()


def _pack_half(d: Tensor) -> Tensor:
    return d.to(torch.float16)[:, None].contiguous().view(torch.uint8)


def _fitted(x: Tensor, weights: Tensor | None, starts: list[Tensor], low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return (d, q) that minimise sum w (x - d q)^2 over the starting scales, each refitted once and cast to fp16."""
    w = torch.ones_like(x) if weights is None else weights
    least, scale, codes = torch.full_like(starts[0], torch.inf), torch.zeros_like(starts[0]), torch.zeros_like(x)
    for start in starts:
        d = start
        for _ in range(2):
            d = d.to(torch.float16).float()
            safe = torch.where(d == 0, torch.ones_like(d), d)
            q = torch.where(d[:, None] == 0, torch.zeros_like(x), (x / safe[:, None]).round().clamp(low, high))
            error = (w * (x - d[:, None] * q).square()).sum(1)
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, d, scale)
            codes = torch.where(better[:, None], q, codes)
            d = (w * x * q).sum(1) / (w * q * q).sum(1).clamp(min=_TINY)
    return scale, codes


def _pack_q8_0(x: Tensor, w: Tensor | None) -> Tensor:
    top = x.float().abs().amax(1)
    # A refit moves the extreme by a few steps at most: without weights every scale that it may have had is tried.
    d, q = _fitted(x.float(), w, [top / k for k in range(127, 125 if w is not None else 119, -1)], -127, 127)
    return torch.cat([_pack_half(d), q.to(torch.int8).view(torch.uint8)], 1)


def _unpack_q8_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * raw[:, 2:].contiguous().view(torch.int8).float()


def _pack_q4_0(x: Tensor, w: Tensor | None) -> Tensor:
    x = x.float()
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    # Values that are on such a grid already are found exactly: their extreme is d times one of all these.
    divisors = (-8, -7, 7, -6, 6, -5, 5) if w is not None else (-8, *(s * k for k in range(7, 0, -1) for s in (-1, 1)))
    d, q = _fitted(x, w, [extreme / k for k in divisors], -8, 7)
    code = (q + 8).to(torch.uint8)
    return torch.cat([_pack_half(d), code[:, :16] | code[:, 16:] << 4], 1)


def _unpack_q4_0(raw: Tensor) -> Tensor:
    code = torch.cat([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1)
    return _half(raw[:, :2]) * (code.float() - 8)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _pack_q1_0(x: Tensor, w: Tensor | None) -> Tensor:
    x = x.float()
    d = x.abs().mean(1) if w is None else (w * x.abs()).sum(1) / w.sum(1)
    bits = (x >= 0).reshape(-1, 16, 8).to(torch.uint8) * _BITS
    return torch.cat([_pack_half(d), bits.sum(2, dtype=torch.uint8)], 1)


def _unpack_q1_0(raw: Tensor) -> Tensor:
    bits = (raw[:, 2:, None] & _BITS != 0).reshape(-1, 128)
    return _half(raw[:, :2]) * (bits.float() * 2 - 1)


def _ternary(x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (d, q in {0, 1, 2}): the k largest |x| become +-d, with the k that leaves the least error.

    For equal weights the error is sum x^2 - (sum of the k largest)^2 / k, so k is found from one sort.
    """
    x = x.float()
    size, order = x.abs().sort(1, descending=True)
    weight = torch.ones_like(x) if w is None else w.gather(1, order)
    gain = (weight * size).cumsum(1).square() / weight.cumsum(1)
    k = gain.argmax(1, keepdim=True)
    d = ((weight * size).cumsum(1).gather(1, k) / weight.cumsum(1).gather(1, k))[:, 0]
    kept = torch.zeros_like(x).scatter_(1, order, (torch.arange(x.shape[1]) <= k).float())
    return d, (torch.sign(x) * kept + 1).to(torch.uint8)


def _pack_tq2_0(x: Tensor, w: Tensor | None) -> Tensor:
    d, q = _ternary(x, w)
    four = q.reshape(-1, 2, 4, 32)
    codes = four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6
    return torch.cat([codes.reshape(-1, 64), _pack_half(d)], 1)


def _unpack_tq2_0(raw: Tensor) -> Tensor:
    codes = raw[:, :64].reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[None, None, :, None]
    return _half(raw[:, 64:]) * ((codes >> shifts & 3).float() - 1).reshape(-1, 256)


# (first value, values a byte, bytes): value i of a byte lies i * bytes after the byte's first.
_TRITS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def _pack_tq1_0(x: Tensor, w: Tensor | None) -> Tensor:
    d, q = _ternary(x, w)
    parts = []
    for first, n, width in _TRITS:
        trits = q[:, first : first + n * width].reshape(-1, n, width).int()
        number = torch.zeros_like(trits[:, 0])
        for i in range(5):
            number = number * 3 + (trits[:, i] if i < n else 0)
        parts.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat([*parts, _pack_half(d)], 1)


def _unpack_tq1_0(raw: Tensor) -> Tensor:
    parts, at = [], 0
    for _, n, width in _TRITS:
        number = raw[:, None, at : at + width].int()
        power = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32)[:n, None]
        parts.append((((number * power) & 255) * 3 >> 8).reshape(len(raw), n * width))
        at += width
    return _half(raw[:, 52:]) * (torch.cat(parts, 1).float() - 1)


TYPES: dict[str, BlockType] = {t.name: t for t in (
    _plain("f32", 0, torch.float32), _plain("f16", 1, torch.float16), _plain("bf16", 30, torch.bfloat16),
    BlockType("q8_0", 8, 32, 34, 2.7e-5, _pack_q8_0, _unpack_q8_0),
    BlockType("q4_0", 2, 32, 18, 6.8e-3, _pack_q4_0, _unpack_q4_0),
    BlockType("tq1_0", 34, 256, 54, 0.19, _pack_tq1_0, _unpack_tq1_0),
    BlockType("tq2_0", 35, 256, 66, 0.19, _pack_tq2_0, _unpack_tq2_0),
    BlockType("q1_0", 41, 128, 18, 0.36, _pack_q1_0, _unpack_q1_0))}
BY_ID: dict[int, BlockType] = {t.id: t for t in TYPES.values()}
