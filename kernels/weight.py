"""Base weights as the kernels read them: plain floats, or 4-bit codes into a table with one scale per 64 columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError

BLOCK = 64
Code = Literal["plain", "nf4", "int4"]

# Dettmers et al. 2023 (arXiv 2305.14314), appendix E: quantiles of N(0, 1) scaled to [-1, 1] with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
INT4 = tuple(float(code - 8) for code in range(16))


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A base matrix w0 (m, n) in the form it is stored in.

    `plain`: data (m, n), fp32, bf16 or fp16. `nf4` and `int4`: data (m, n64 / 2) uint8 with n64 = n rounded up to 64,
    the even column in the high nibble; scales (m, n64 / 64) float32 of any strides; w0 = table[code] * scale.
    """

    code: Code
    data: Tensor
    scales: Tensor | None
    shape: tuple[int, int]

    @property
    def table(self) -> tuple[float, ...]:
        """The 16 values a 4-bit code stands for before its scale."""
        return NF4 if self.code == "nf4" else INT4

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this weight must read."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def plain_weight(data: Tensor) -> Weight:
    """Wrap an (m, n) float matrix without copying it."""
    if data.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"base weight has dtype {data.dtype}, the kernels read float32, bfloat16 and float16")
    return Weight("plain", data.contiguous(), None, (data.shape[0], data.shape[1]))


def pack_weight(dense: Tensor, code: Code) -> Weight:
    """Quantise an (m, n) matrix to 4 bits, round to nearest in blocks of 64 columns; the inverse is `unpack_weight`.

    nf4: scale = max|w|. int4: scale = max|w| / 7, codes -7..7 (the code -8 is read but never written).
    """
    m, n = dense.shape
    padded = -(-n // BLOCK) * BLOCK
    work = torch.zeros(m, padded, dtype=torch.float32, device=dense.device)
    work[:, :n] = dense
    blocks = work.view(m, -1, BLOCK)
    scales = blocks.abs().amax(-1) / (1.0 if code == "nf4" else 7.0)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    if code == "nf4":
        table = torch.tensor(NF4, device=dense.device)
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
    else:
        codes = unit.round().add(8)
    codes = codes.to(torch.uint8).view(m, padded)
    return Weight(code, (codes[:, 0::2] << 4) | codes[:, 1::2], column_major(scales), (m, n))


def unpack_weight(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dense (m, n) matrix that the codes stand for."""
    if weight.scales is None:
        return weight.data.to(dtype)
    m, n = weight.shape
    table = torch.tensor(weight.table, device=weight.data.device)
    codes = torch.stack((weight.data >> 4, weight.data & 15), dim=-1).view(m, -1, BLOCK)
    dense = table[codes.long()] * weight.scales[..., None]
    return dense.view(m, -1)[:, :n].to(dtype)


def nf4_from_bitsandbytes(packed: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> Weight:
    """Wrap the codes of a bitsandbytes `Params4bit` without copying them; `absmax` is already float32.

    Its blocks run over the flattened matrix, so rows must hold whole blocks: n a multiple of 64 and blocksize 64.
    """
    m, n = shape
    if blocksize != BLOCK or n % BLOCK:
        raise UnsupportedError(
            f"nf4 weight {m} x {n} has blocks of {blocksize}, the kernels read blocks of {BLOCK} that end with the row"
        )
    if packed.numel() * 2 != m * n or absmax.numel() * BLOCK != m * n:
        raise UnsupportedError(f"nf4 weight {m} x {n} has {packed.numel()} code bytes and {absmax.numel()} scales")
    scales = absmax.to(torch.float32).view(m, n // BLOCK)
    return Weight("nf4", packed.view(torch.uint8).reshape(m, n // 2), column_major(scales), shape)


def column_major(scales: Tensor) -> Tensor:
    """Lay scales out so that neighbouring rows are neighbours on a GPU: a tile there reads many rows of one block."""
    return scales.t().contiguous().t() if scales.is_cuda else scales.contiguous()
