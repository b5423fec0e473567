"""Bit planes around a core: dW ~ P M Q with small odd integers in P and Q, that is, sign planes, and a refitted core M.

A b-bit mid-rise code is sum_j 2^j s_j with signs s_j, so one kernel that multiplies by signs serves every width. Planes
go where the singular values ask for them, the core is the least-squares one, and codes are improved by coordinate
descent on |dW - P M Q|, in exact steps, so the error never rises. There is no entropy coding: at equal error this is
larger than `rd`. It is the form for kernels that compute on codes, not for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import UsageError
from adaptc.quant.pack import pack_codes, packed_nbytes, unpack_codes
from adaptc.squeeze.factored import core_svd, truncate

WIDEST = 6
# least error of a mid-rise quantizer with b bits on N(0, 1), and the step that reaches it
_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104)
_STEP = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041)
_CORE_BITS = 16
_DIRECTION_BITS = 8  # the two widths


@dataclass(frozen=True)
class BitPlanes:
    """Codes of one delta: dW ~ p_codes @ core @ q_codes; every code is odd and below 2^bits in magnitude."""

    p_codes: Tensor  # (m, r) int8
    q_codes: Tensor  # (r, n) int8
    core: Tensor  # (r, r) float32 with float16 mantissas; diagonal where `diagonal`
    bits: tuple[int, ...]  # of both vectors of each direction
    diagonal: bool

    @property
    def nbytes(self) -> int:
        """Bytes of planes, core, its exponent, and widths."""
        m, n, r = len(self.p_codes), self.q_codes.shape[1], len(self.bits)
        return packed_nbytes((m + n) * sum(self.bits), 1) + 2 * (r if self.diagonal else r * r) + r + 4

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return float32 b (m, r), a (r, n) with dW ~ b @ a."""
        return self.p_codes.float() @ self.core, self.q_codes.float()

    def planes(self) -> Tensor:
        """Return all codes as packed bits: direction after direction, p then q, (code + 2^b - 1) / 2 in b bits."""
        both = torch.cat([self.p_codes, self.q_codes.T]).to(torch.int16)
        bits = [unpack_codes(pack_codes((both[:, k] + (1 << b) - 1).to(torch.uint8) >> 1, b), 1, b * len(both))
                for k, b in enumerate(self.bits)]
        return pack_codes(torch.cat(bits) if bits else torch.zeros(0, dtype=torch.uint8), 1)


def unpack_planes(data: Tensor, bits: Sequence[int], m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return p_codes (m, r) and q_codes (r, n) of `BitPlanes.planes`. Raises FormatError for other byte counts."""
    flat = unpack_codes(data, 1, (m + n) * sum(bits))
    columns, at = [torch.zeros(m + n, 0, dtype=torch.int8)], 0
    for b in bits:
        code = unpack_codes(pack_codes(flat[at : at + b * (m + n)], 1), b, m + n)
        columns.append((2 * code.to(torch.int16) - (1 << b) + 1).to(torch.int8)[:, None])
        at += b * (m + n)
    both = torch.cat(columns, 1)
    return both[:m], both[m:].T


def bit_planes(b: Tensor, a: Tensor, scale: float, bits_per_param: float, *, sweeps: int = 4) -> BitPlanes:
    """Code dW = scale * b @ a within `bits_per_param` stored bits a parameter of b and a; everything counted.

    A dense and a diagonal core are both tried and the better is kept. Raises UsageError below one direction of one bit.
    """
    core = core_svd(b, a, None, scale)
    rank = int((core.s > core.s[0] * 1e-12).sum()) if len(core.s) and core.s[0] > 0 else 0
    cut = truncate(b, a, max(rank, 1), scale=scale, dtype=torch.float64, core=core)
    spectrum = cut.b.norm(dim=0) * cut.a.norm(dim=1)
    u, v = cut.b / cut.b.norm(dim=0).clamp(min=1e-300), (cut.a / cut.a.norm(dim=1).clamp(min=1e-300)[:, None]).T
    budget = bits_per_param * (b.numel() + a.numel())
    made = []
    for diagonal in (True, False):
        widths = _widths(spectrum.tolist(), len(b) + a.shape[1], budget, diagonal)
        if widths:
            made.append(_fit(u, spectrum, v, widths, diagonal, sweeps))
    if not made:
        least = (len(b) + a.shape[1] + _CORE_BITS + _DIRECTION_BITS + 32) / (b.numel() + a.numel())
        raise UsageError(f"{bits_per_param:g} bits a parameter are too few for one direction, which takes {least:.3g}")
    return min(made, key=lambda pair: pair[0])[1]


def _widths(spectrum: list[float], samples: int, budget: float, diagonal: bool) -> list[int]:
    """Spend the budget a plane at a time, always where it removes most error a bit."""
    widths = [0] * len(spectrum)
    left = budget - 32
    while True:
        kept = sum(w > 0 for w in widths)
        best, choice, price = 0.0, -1, 0.0
        for k, (s, w) in enumerate(zip(spectrum, widths, strict=True)):
            if w == WIDEST:
                continue
            opening = _DIRECTION_BITS + _CORE_BITS * (1 if diagonal else 2 * kept + 1) if w == 0 else 0
            cost = samples + opening
            gain = s * s * ((1 - _ERROR[w + 1]) ** 2 - (1 - _ERROR[w]) ** 2)
            if cost <= left and gain / cost > best:
                best, choice, price = gain / cost, k, cost
        if choice < 0:
            return [w for w in widths if w]
        widths[choice] += 1
        left -= price


def _fit(u: Tensor, s: Tensor, v: Tensor, widths: list[int], diagonal: bool, sweeps: int) -> tuple[float, BitPlanes]:
    """Quantize, then alternate core and codes; return the squared error and the codes."""
    r = len(widths)
    top = torch.tensor([(1 << b) - 1 for b in widths], dtype=torch.float64)
    step = torch.tensor([_STEP[b] for b in widths], dtype=torch.float64)

    def odd(x: Tensor) -> Tensor:
        return (2 * torch.floor(x / 2) + 1).clamp(-top, top)

    p, q = (odd(2 * x[:, :r] * len(x) ** 0.5 / step) for x in (u, v))
    core, left = _core(u, s, v, p, q, diagonal)
    for _ in range(sweeps):
        before = left
        p = _descend(p, u @ (s[:, None] * (v.T @ q)) @ core.T, core @ (q.T @ q) @ core.T, odd)
        core, left = _core(u, s, v, p, q, diagonal)
        q = _descend(q, v @ (s[:, None] * (u.T @ p)) @ core, core.T @ (p.T @ p) @ core, odd)
        core, left = _core(u, s, v, p, q, diagonal)
        if left > before * (1 - 1e-3):
            break
    unit = 2.0 ** torch.floor(torch.log2(core.abs().max().clamp(min=1e-300)))
    stored = (core / unit).half().double() * unit
    planes = BitPlanes(p.to(torch.int8), q.T.to(torch.int8), stored.float(), tuple(widths), diagonal)
    return left, planes


def _core(u: Tensor, s: Tensor, v: Tensor, p: Tensor, q: Tensor, diagonal: bool) -> tuple[Tensor, float]:
    """Solve min_M |dW - p M q^T|^2 over dense or diagonal M; return M and the squared error."""
    cross = (p.T @ u) * s @ (v.T @ q)
    gp, gq = p.T @ p, q.T @ q
    ridge = 1e-9 * torch.eye(len(gp), dtype=torch.float64)
    if diagonal:
        gram = gp * gq
        g = torch.linalg.solve(gram + ridge * gram.diagonal().mean(), cross.diagonal())
        return torch.diag(g), float((s * s).sum() - 2 * g @ cross.diagonal() + g @ gram @ g)
    half = torch.linalg.solve(gp + ridge * gp.diagonal().mean(), cross)
    core = torch.linalg.solve(gq + ridge * gq.diagonal().mean(), half.T).T
    return core, float((s * s).sum() - 2 * (core * cross).sum() + (core * (gp @ core @ gq)).sum())


def _descend(codes: Tensor, target: Tensor, gram: Tensor, odd: object) -> Tensor:
    """Set each column of `codes` (samples, r) in turn to its best odd values for |x - codes W|, target = x W^T."""
    assert callable(odd)
    codes = codes.clone()
    for j in range(codes.shape[1]):
        rest = target[:, j] - codes @ gram[:, j] + codes[:, j] * gram[j, j]
        wanted = codes.clone()
        wanted[:, j] = rest / gram[j, j].clamp(min=1e-300)
        codes[:, j] = odd(wanted)[:, j]
    return codes
