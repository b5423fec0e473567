"""One factor pair in llama.cpp's tensor types: which gauge, what the padded ranks hold, and the best bytes.

dW = B A is the same for every B M, M^-1 A. Types with blocks share a scale along the rank of B, so it matters how much
of the singular values B carries: B = U S^p, A = S^(1 - p) V^T, with p = 0 (columns of B alike) better for flat spectra
and p = 1/2 for steep ones. Both are coded, and the factors as given, and the best is kept. After A is rounded, B is
fitted to it again, least ||dW - B A||^2 + t ||B - B0||^2 with t the noise of B's own rounding: without it the fit
makes columns of B large where rows of A are small, and the shared scale coarse. A rank below the block of B's type is
padded, and the padding is put to use: rows that code what is left of the row space of dW.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.formats.gguf_types import TYPES, BlockType
from adaptc.squeeze.factored import core_svd

# Directions below this share of ||dW|| are not worth a padded rank: every type with blocks loses more in B itself.
_NOTHING = 1e-3
_POWERS = (0.0, 0.5)  # shares of the singular values on B's side that are tried


@dataclass(frozen=True, eq=False)
class Pair:
    """A coded pair: uint8 (rows, bytes of a row) with the types. a: (rank, in); b: (out, rank), rank padded."""

    a: Tensor
    b: Tensor
    type_a: BlockType
    type_b: BlockType
    rank: int


def fallback(name: str, width: int) -> BlockType:
    """Return the type called `name`, or the next with more bits whose blocks divide `width`: q4_0, then f16."""
    chosen = TYPES[name]
    if not width % chosen.block:
        return chosen
    near = TYPES["q8_0" if name == "q8_0" else "q4_0"]
    return near if not width % near.block else TYPES["f16"]


def code_pair(b: Tensor, a: Tensor, type_a: str, type_b: str) -> Pair:
    """Return the codes of dW = b @ a for float64 b (out, r), a (r, in).

    Types whose blocks do not divide `in` fall back; the rank is padded to the blocks of B's type. Factors that the
    types hold exactly are kept as they are. Raises FormatError for factors that are not finite or beyond fp16.
    """
    kind_a, kind_b = fallback(type_a, a.shape[1]), TYPES[type_b]
    rank = -(-max(a.shape[0], 1) // kind_b.block) * kind_b.block
    if a.is_meta or b.is_meta:
        return Pair(torch.empty(rank, kind_a.row_bytes(a.shape[1]), dtype=torch.uint8),
                    torch.empty(b.shape[0], kind_b.row_bytes(rank), dtype=torch.uint8), kind_a, kind_b, rank)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise FormatError("factors are not finite")
    wide_a, wide_b = _padded(a, b, rank)
    if not (kind_a.quantized or kind_b.quantized) or (_holds(kind_a, wide_a) and _holds(kind_b, wide_b)):
        made = Pair(kind_a.encode(wide_a), kind_b.encode(wide_b), kind_a, kind_b, rank)
        return made if _finite(made) else _balanced(wide_b, wide_a, kind_a, kind_b)
    u, s, v = _svd(b, a)
    tried = [_coded(u * s**p, v * (s ** (1 - p))[:, None], s**p, kind_a, kind_b, rank)
             for p in (_POWERS if kind_b.quantized else _POWERS[:1])]
    given = Pair(kind_a.encode(wide_a), kind_b.encode(wide_b, wide_a.square().sum(1)), kind_a, kind_b, rank)
    return min([p for p in (*tried, given) if _finite(p)] or tried, key=lambda pair: _error2(pair, b, a))


def _coded(u: Tensor, right: Tensor, weights: Tensor, kind_a: BlockType, kind_b: BlockType, rank: int) -> Pair:
    """Return the codes of u @ right in this gauge; `weights` (k,) are the sizes of the columns of u."""
    level = float((right.square().mean() / u.square().mean().clamp(min=1e-300)).sqrt().sqrt()) or 1.0
    u, right, weights = u * level, right / level, weights * level  # values of both sides alike, far from fp16's ends
    raw = _coded_rows(right, weights, kind_a, rank)
    rows = kind_a.decode(raw).double()
    gram = rows @ rows.mT
    ridge = 0.25 * kind_b.noise * float(gram.diagonal().mean())
    start = torch.eye(rank, u.shape[1], dtype=torch.float64)  # B0 = u in the first columns, nothing in the padding
    left = u @ (start + _solved(gram, rows @ (right - start.mT @ rows).mT, ridge)).mT
    return Pair(raw, kind_b.encode(left, gram.diagonal()), kind_a, kind_b, rank)


def _error2(pair: Pair, b: Tensor, a: Tensor) -> float:
    """Return ||b a - B A||^2 of the codes, but for a term that is the same for all of them."""
    left, right = pair.type_b.decode(pair.b).double(), pair.type_a.decode(pair.a).double()
    own = (left.mT @ left) * (right @ right.mT)
    return float(own.sum() - 2 * ((left.mT @ b) * (right @ a.mT)).sum())


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - a.shape[0]
    return (torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))


def _holds(kind: BlockType, x: Tensor) -> bool:
    """Return whether `kind` stores x without error."""
    return bool(torch.equal(kind.decode(kind.encode(x)).double(), x))


def _finite(pair: Pair) -> bool:
    return all(bool(torch.isfinite(kind.decode(raw).float()).all())
               for kind, raw in ((pair.type_a, pair.a), (pair.type_b, pair.b)))


def _balanced(b: Tensor, a: Tensor, kind_a: BlockType, kind_b: BlockType) -> Pair:
    """Return the pair with the magnitudes of both sides alike, for factors of which one overflows its type."""
    shift = 2.0 ** torch.round(torch.log2(b.abs().amax() / a.abs().amax().clamp(min=1e-300)) / 2)
    made = Pair(kind_a.encode(a * shift), kind_b.encode(b / shift), kind_a, kind_b, a.shape[0])
    if not _finite(made):
        raise FormatError(f"factors do not fit {kind_a.name} and {kind_b.name}, the largest is "
                          f"{max(float(a.abs().max()), float(b.abs().max())):.3g}")
    return made


def _svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (u, s, v) with u diag(s) v = b @ a, but for directions that are rounding only."""
    core = core_svd(b, a)
    k = int((core.s > core.s[:1] * 1e-12).sum()) if core.s.numel() else 0
    u = (core.q_b if core.q_b is not None else b) @ core.map_b[:, :k]
    v = core.map_a[:k] @ (core.q_a if core.q_a is not None else a)
    return u, core.s[:k], v


def _coded_rows(right: Tensor, weights: Tensor, kind: BlockType, rank: int) -> Tensor:
    """Return the codes of `rank` rows: those of `right` (k, in), then of what they leave of dW's row space."""
    raw = kind.encode(right)
    total, usual = (weights[:, None] * right).norm(), weights.square().mean().sqrt()
    while len(raw) < rank:
        rows = kind.decode(raw).double()
        left = right - (_solved(rows @ rows.mT, rows @ right.mT).mT @ rows)
        left = weights[:, None] * left
        values, vectors = torch.linalg.eigh(left @ left.mT)
        keep = (values > (_NOTHING * total) ** 2).flip(0)
        new = (vectors.mT @ left).flip(0)[keep][: rank - len(raw)] / usual  # so that B's columns stay of their size
        if not len(new):
            return torch.cat([raw, kind.encode(right.new_zeros(rank - len(raw), right.shape[1]))])
        raw = torch.cat([raw, kind.encode(new)])
    return raw


def _solved(gram: Tensor, right: Tensor, ridge: float = 0.0) -> Tensor:
    """Return (gram + ridge I)^+ @ right for a Gram matrix that zero rows may have made singular."""
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.diagonal().clamp(min=1e-300).rsqrt()
    scale = torch.where(gram.diagonal() > 0, scale, torch.zeros_like(scale))
    values, vectors = torch.linalg.eigh(gram * scale[:, None] * scale)
    inverse = torch.where(values > 1e-10, 1 / values.clamp(min=1e-10), torch.zeros_like(values))
    made: Tensor = scale[:, None] * (vectors @ (inverse[:, None] * (vectors.mT @ (scale[:, None] * right))))
    return made
