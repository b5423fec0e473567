"""Positions of a sparse delta in the fewest plain bits: Golomb-Rice coded gaps, in blocks that decode by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.factor import Encoded, Factor

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# Positions in a block, on average: its 12 bytes of table then cost 0.012 bits a position at most.
FILL = 8192
OWN_GROUP = 512  # bytes of manifest and headers that a module costs whose tensors are of no other's shape
LARGEST = 2**31 - 1  # span and modulus; products of both stay within int64


@dataclass(frozen=True, kw_only=True)
class Golomb:
    """Rising positions below `size`, in blocks of `span` positions each, gap by gap.

    Streams: `table` (int32, for each block the number of its positions, its modulus M, its bytes) and `bits` (uint8,
    the blocks). A gap g, the positions skipped since the last one or the block's start, is q M + r. With
    k = floor(log2 M) and c = 2^(k + 1) - M, r < c is the head r, any other r the head (r + c) >> 1, at least c, and
    the tail (r + c) & 1. A block holds the heads (k bits each, first bit low), then q zeros and a one for each gap,
    then the tails; it ends at a byte. For M = 2^k this is Rice coding. Other M are allowed because Rice alone is up
    to 0.12 bits a position above the entropy of a random mask; with them it is 0.02 to 0.034 bits.

    Not for masks of whole rows or columns: a random mask of the same size costs as much as they do at worst.
    """

    id: ClassVar[str] = "golomb"
    size: int
    span: int

    def __post_init__(self) -> None:
        """Refuse options of the wrong type or size: they may come from a file."""
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1 or (name == "span" and value > LARGEST):
                raise UsageError(f"golomb takes {name} as a whole number from 1, not {str(value)[:40]!r}")

    @classmethod
    def encode(cls, indices: Tensor, size: int, row: int = 1) -> Encoded:
        """Return rising positions (k,) below `size` as codes; blocks are of whole rows of `row` positions.

        Raises FormatError for positions that do not rise or lie outside.
        """
        at: Ints = indices.numpy().astype(np.int64, copy=False)
        if len(at) and (int(at[0]) < 0 or int(at[-1]) >= size or bool((at[1:] <= at[:-1]).any())):
            raise FormatError(f"{len(at)} positions do not rise from 0 to below {size}")
        rows = max(1, round(FILL * size / (row * max(len(at), 1))))
        span = min(rows * row, max(size, 1), LARGEST)
        made = cls(size=max(size, 1), span=span)
        ends = np.searchsorted(at, np.arange(1, made.blocks + 1, dtype=np.int64) * span)
        table, chunks, first = np.zeros((made.blocks, 3), np.int32), [], 0
        for i, last in enumerate(ends.tolist()):
            gaps = np.diff(at[first:last], prepend=i * span - 1) - 1
            modulus = best_modulus(gaps, span)
            chunks.append(pack_gaps(gaps, modulus))
            table[i] = last - first, modulus, len(chunks[-1])
            first = last
        bits = np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)
        streams = {"table": torch.from_numpy(table.reshape(-1)), "bits": torch.from_numpy(bits)}
        return Encoded(cls.id, asdict(made), streams, torch.Size([len(at)]), torch.int64)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.span)

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for streams that cannot be those of `shape` (k,) positions. Looks at the table alone."""
        if set(streams) != {"table", "bits"} or len(shape) != 1:
            raise FormatError(f"golomb: streams are {', '.join(sorted(streams))[:80]} for shape {tuple(shape)}")
        table, bits = streams["table"], streams["bits"]
        if table.dtype != torch.int32 or bits.dtype != torch.uint8 or table.dim() != 1 or bits.dim() != 1:
            raise FormatError(f"golomb: streams are {str(table.dtype)[6:]} {tuple(table.shape)} and "
                              f"{str(bits.dtype)[6:]} {tuple(bits.shape)}, expected flat int32 and uint8")
        if table.numel() != 3 * self.blocks:
            raise FormatError(f"golomb: table has {table.numel()} numbers for {self.blocks} blocks, expected "
                              f"{3 * self.blocks}")
        counts, moduli, nbytes = table.numpy().astype(np.int64).reshape(-1, 3).T
        if bool((counts < 0).any() or (counts > np.minimum(8 * nbytes, self.span)).any()):
            raise FormatError(f"golomb: a block claims more positions than its bits or its {self.span} places hold")
        if bool((moduli < 1).any() or (moduli > self.span).any()):
            raise FormatError(f"golomb: a block has modulus {int(moduli.min())} to {int(moduli.max())}, must be 1 to "
                              f"{self.span}")
        if int(counts.sum()) != shape[0] or int(nbytes.sum()) != bits.numel():
            raise FormatError(f"golomb: blocks hold {int(counts.sum())} positions in {int(nbytes.sum())} bytes, "
                              f"expected {shape[0]} in {bits.numel()}")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the positions (k,). Raises FormatError for streams that do not make so many rising ones."""
        self.check(streams, shape)
        return torch.from_numpy(self._between(streams, 0, self.blocks)).to(dtype)

    def block(self, streams: Mapping[str, Tensor], number: int) -> tuple[int, Tensor]:
        """Return how many positions come before block `number`, and its own, without decoding the others."""
        before = int(streams["table"][: 3 * number : 3].sum())
        return before, torch.from_numpy(self._between(streams, number, number + 1))

    def _between(self, streams: Mapping[str, Tensor], first: int, last: int) -> Ints:
        """Return the positions of the blocks first..last - 1 of checked streams."""
        table, data = streams["table"].numpy().reshape(-1, 3).astype(np.int64), streams["bits"].numpy()
        made: Ints = np.empty(int(table[first:last, 0].sum()), np.int64)
        at, begin = 0, int(table[:first, 2].sum())
        for i in range(first, last):
            count, modulus, nbytes = table[i].tolist()
            places = min(self.span, self.size - i * self.span)
            gaps = unpack_gaps(data[begin : begin + nbytes], modulus, count, places)
            np.cumsum(gaps + 1, out=made[at : at + count])
            if count and int(made[at + count - 1]) > places:
                raise FormatError(f"golomb: block {i} runs to {int(made[at + count - 1])} of its {places} places")
            made[at : at + count] += i * self.span - 1
            at, begin = at + count, begin + nbytes
        return made


def shorter(indices: Factor, size: int, row: int) -> Factor:
    """Return codes of rising indices where they pay for a group of their own in a container, else what is given."""
    if isinstance(indices, Encoded) or indices.is_meta or indices.nbytes <= OWN_GROUP:
        return indices
    made = Golomb.encode(indices, size, row)
    return made if made.nbytes + OWN_GROUP < indices.nbytes else indices


def best_modulus(gaps: Ints, span: int) -> int:
    """Return the modulus with the fewest bits among those near ln 2 times the mean gap, and below for clusters."""
    if not len(gaps):
        return 1
    middle = math.log(2) * (float(gaps.mean()) + 0.5)
    tried = {min(max(1, round(middle * 2 ** (step / 4))), span) for step in (-8, -6, -4, -2, -1, 0, 1)}
    narrow = gaps.astype(np.int32)
    return min(sorted(tried), key=lambda modulus: coded_bits(narrow, modulus))


def coded_bits(gaps: npt.NDArray[np.signedinteger[Any]], modulus: int) -> int:
    """Return the bits of `gaps` at a modulus, without padding."""
    k = modulus.bit_length() - 1
    q, r = np.divmod(gaps, modulus)
    return len(gaps) * (k + 1) + int(q.sum()) + int((r >= 2 ** (k + 1) - modulus).sum())


def pack_gaps(gaps: Ints, modulus: int) -> Bytes:
    """Return one block: heads, quotients, tails, padded to a byte."""
    k = modulus.bit_length() - 1
    cut = 2 ** (k + 1) - modulus
    q, r = np.divmod(gaps, modulus)
    late = r >= cut
    heads = np.where(late, (r + cut) >> 1, r)
    tails = (r[late] + cut) & 1
    ones = np.cumsum(q + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    unary[ones] = 1
    planes = (heads[:, None] >> np.arange(k)) & 1
    made: Bytes = np.packbits(np.concatenate([planes.reshape(-1).astype(np.uint8), unary, tails.astype(np.uint8)]),
                              bitorder="little")
    return made


def unpack_gaps(data: Bytes, modulus: int, count: int, places: int) -> Ints:
    """Return the `count` gaps of one block of `places` positions.

    Raises FormatError for a block that ends early, that has bits left over, or whose gaps pass its end by far.
    """
    k = modulus.bit_length() - 1
    cut = 2 ** (k + 1) - modulus
    if 8 * len(data) < count * (k + 1):
        raise FormatError(f"golomb: {len(data)} bytes are too few for {count} gaps with {k}-bit heads")
    heads = _heads(data, k, count)
    rest = np.unpackbits(data[count * k >> 3 :], bitorder="little")[count * k & 7 :]
    ones = np.flatnonzero(rest.view(np.bool_))
    if len(ones) < count:
        raise FormatError(f"golomb: a block of {len(data)} bytes ends after {len(ones)} of {count} gaps")
    ends = ones[:count]
    used = int(ends[-1]) + 1 if count else 0
    late = heads >= cut
    total = used + int(late.sum())
    if len(rest) - total not in range(8) or bool(rest[total:].any()):
        raise FormatError(f"golomb: a block of {len(data)} bytes has {len(rest) - total} bits left over")
    if (used - count) * modulus > places:
        raise FormatError(f"golomb: gaps of {(used - count) * modulus} and more in a block of {places} places")
    heads[late] = 2 * heads[late] + rest[used:total] - cut
    quotients = np.diff(ends, prepend=-1) - 1
    made: Ints = quotients * modulus + heads
    return made


def _heads(data: Bytes, k: int, count: int) -> Ints:
    """Return `count` numbers of k bits, the first in the low bits: eight numbers are k bytes."""
    groups = -(-count // 8)
    raw = np.zeros(groups * k, np.uint8)
    some = data[: -(-count * k // 8)]
    raw[: len(some)] = some
    columns = raw.reshape(groups, k)
    if k <= 8:  # the eight in one word
        words = np.zeros((groups, 8), np.uint8)
        words[:, :k] = columns
        made = words.view("<i8") >> np.arange(0, 8 * k, k) if k else np.zeros((groups, 8), np.int64)
        return (made & ((1 << k) - 1)).reshape(-1)[:count]
    made = np.zeros((groups, 8), np.int64)
    for j in range(8):
        first, shift = j * k >> 3, j * k & 7
        for t in range(-(-(shift + k) // 8)):
            made[:, j] |= columns[:, first + t].astype(np.int64) << 8 * t
        made[:, j] = (made[:, j] >> shift) & ((1 << k) - 1)
    return made.reshape(-1)[:count]
