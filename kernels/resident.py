"""An adapter as the kernels read it: sign planes around a small core, or plain half-precision factors.

A mid-rise code of b bits is an odd integer c = sum_j 2^j s_j with s_j in {-1, +1}, so every width, and every mixture of
widths, is a bag of sign planes. The powers of two, the scales of the directions and the adapter's own core fold into
one float32 matrix: dW = P M Q = Sp C^T Sq with Sp (m, tp), Sq (tq, n) in {-1, +1}; a kernel knows one width only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError

WORD = 16  # planes in a word; also the smallest contraction a tensor core takes, so ranks are padded to it
MAX_PLANES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """One low-rank delta in its run-time layout: y += s * (x @ q^T) @ core @ p^T.

    Planes: q (tq / 16, n) int16, p (tp / 16, m) int16; bit t of word w is plane 16 w + t, set for +1.
    Plain: q (tq, n) and p (tp, m), float16, bfloat16 or float32. core (tq, tp) float32; padding is zero in the core
    (planes) or in the factors (plain). tq and tp are 16, 32, 64, 128 or 256: a tile's sides are powers of two.
    """

    q: Tensor
    p: Tensor
    core: Tensor
    rank: int
    native: Any = field(default=None, init=False, repr=False)  # the CPU's own layout, made at its first product

    @property
    def packed(self) -> bool:
        """Whether the factors are sign planes."""
        return self.q.dtype == torch.int16

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta."""
        return self.p.shape[1], self.q.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this delta must read."""
        return self.q.nbytes + self.p.nbytes + self.core.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the tensors alone: `native` holds addresses."""
        return Resident, (self.q, self.p, self.core, self.rank)

    def to(self, device: torch.device | str) -> Resident:
        """Return the same delta on another device."""
        return Resident(self.q.to(device), self.p.to(device), self.core.to(device), self.rank)


def pack_planes(
    p_codes: Tensor,  # (m, r_p) odd integers, |c| < 2^bits
    q_codes: Tensor,  # (r_q, n)
    core: Tensor | None,  # (r_p, r_q), None is the identity
    p_bits: Sequence[int],
    q_bits: Sequence[int],
    p_scale: Tensor | None = None,  # (r_p,)
    q_scale: Tensor | None = None,  # (r_q,)
) -> Resident:
    """Lay mid-rise codes out as sign planes with everything else folded into the core."""
    r_p, r_q = p_codes.shape[1], q_codes.shape[0]
    inner = torch.eye(r_p, r_q, dtype=torch.float64) if core is None else core.to(torch.float64)
    if p_scale is not None:
        inner = p_scale.to(inner)[:, None] * inner
    if q_scale is not None:
        inner = inner * q_scale.to(inner)
    p_words, p_of, p_power = _planes(p_codes.t(), p_bits, "p")
    q_words, q_of, q_power = _planes(q_codes, q_bits, "q")
    folded = torch.zeros(padded(len(q_of)), padded(len(p_of)), dtype=torch.float64)
    folded[: len(q_of), : len(p_of)] = inner.to("cpu")[p_of][:, q_of].t() * q_power[:, None] * p_power
    return Resident(q_words, p_words, folded.to(torch.float32).to(q_words.device), max(r_p, r_q))


def pack_plain(p: Tensor, q: Tensor, core: Tensor | None = None, dtype: torch.dtype = torch.float16) -> Resident:
    """Lay float factors p (m, r_p), q (r_q, n) out in rows padded to 16 with a float32 core (the identity if None)."""
    r_p, r_q = p.shape[1], q.shape[0]
    if not 1 <= max(r_p, r_q) <= MAX_PLANES:
        raise UnsupportedError(f"adapter has rank {max(r_p, r_q)}, the kernels take 1 to {MAX_PLANES}")
    tp, tq = padded(r_p), padded(r_q)
    rows_p, rows_q = p.new_zeros(tp, p.shape[0], dtype=dtype), q.new_zeros(tq, q.shape[1], dtype=dtype)
    rows_p[:r_p], rows_q[:r_q] = p.t(), q
    inner = torch.zeros(tq, tp, dtype=torch.float32, device=q.device)
    inner[:r_q, :r_p] = torch.eye(r_q, r_p) if core is None else core.t()
    return Resident(rows_q, rows_p, inner, max(r_p, r_q))


def unpack(resident: Resident) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Sp (m, tp), core^T (tp, tq), Sq (tq, n)) in float32, whose product is dW."""
    core = resident.core.t()
    if not resident.packed:
        return resident.p.t().float(), core, resident.q.float()
    return unpack_words(resident.p).t(), core, unpack_words(resident.q)


def padded(planes: int) -> int:
    """Return the number of planes a kernel works on: the next power of two, at least one word."""
    return max(WORD, 1 << (planes - 1).bit_length())


def pack_words(signs: Tensor) -> Tensor:
    """Pack planes (t, n), positive for +1, into (padded(t) / 16, n) int16 words; the inverse is `unpack_words`."""
    t, n = signs.shape
    bits = torch.zeros(padded(t), n, dtype=torch.int32, device=signs.device)
    bits[:t] = signs > 0
    weight = 1 << torch.arange(WORD, dtype=torch.int32, device=signs.device)
    return (bits.view(-1, WORD, n) * weight[:, None]).sum(1).to(torch.int16)


def unpack_words(words: Tensor) -> Tensor:
    """Return the planes (16 w, n) in {-1, +1} of (w, n) int16 words."""
    shift = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words.to(torch.int32)[:, None, :] >> shift[:, None]) & 1
    return (2 * bits - 1).to(torch.float32).reshape(-1, words.shape[1])


def _planes(codes: Tensor, bits: Sequence[int], side: str) -> tuple[Tensor, list[int], Tensor]:
    """Split codes (r, n) into words of planes, with each plane's direction and power of two."""
    if len(bits) != codes.shape[0]:
        raise UnsupportedError(f"{side} has {codes.shape[0]} directions and {len(bits)} widths")
    if not 1 <= sum(bits) <= MAX_PLANES or min(bits) < 1:
        raise UnsupportedError(f"{side} has {sum(bits)} sign planes, the kernels take 1 to {MAX_PLANES}")
    whole = codes.to(torch.int32)
    for k, b in enumerate(bits):
        if bool((whole[k] % 2 == 0).any()) or int(whole[k].abs().max()) >= 1 << b:
            raise UnsupportedError(f"{side} direction {k} is not an odd {b}-bit code")
    direction = [k for k, b in enumerate(bits) for _ in range(b)]
    power = [j for b in bits for j in range(b)]
    levels = (whole + (1 << torch.tensor(bits, dtype=torch.int32, device=codes.device))[:, None] - 1) >> 1
    planes = torch.stack([(levels[k] >> j) & 1 for k, j in zip(direction, power, strict=True)])
    return pack_words(planes), direction, torch.tensor([float(1 << j) for j in power], dtype=torch.float64)
