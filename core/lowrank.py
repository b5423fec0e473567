"""Exact low-rank factors of every delta that has them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adaptc.coded import Coded
from adaptc.delta import BaseFree, Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.factor import Encoded, decoded


def low_rank(delta: BaseFree) -> LowRank | None:
    """Return `delta` as one LowRank with the same dW exactly, or None where only a dense or sparse form exists.

    Kron: kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2), rank r1 r2, a dense side taken with one identity factor.
    Hadamard: the rows of A are all products a1_i * a2_j, the columns of B all products b1_i * b2_j (face-splitting
    product), rank r1 r2. Sum: factors side by side. Factors are float64; nothing of size (out, in) is formed.
    """
    match delta:
        case LowRank():
            return delta
        case Coded():
            b, a, scale = delta.factors()
            return LowRank(a, b, None, scale, delta.shape)
        case Kron():
            (b1, a1), (b2, a2) = _side(delta.left), _side(delta.right)
            a, b = torch.kron(a1.contiguous(), a2.contiguous()), torch.kron(b1.contiguous(), b2.contiguous())
            return LowRank(a, b, None, delta.scale, delta.shape)
        case Hadamard():
            (b1, a1), (b2, a2) = delta.left.factors(), delta.right.factors()
            a = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)  # (r1 r2, in)
            b = (b1[:, :, None] * b2[:, None, :]).flatten(1)  # (out, r1 r2)
            return LowRank(a, b, None, delta.scale, delta.shape)
        case Sum():
            parts = [low_rank(t) for t in delta.terms]
            if any(p is None for p in parts):
                return None
            pairs = [p.factors() for p in parts if p is not None]
            return LowRank(torch.cat([a for _, a in pairs], -2), torch.cat([b for b, _ in pairs], -1), None, 1.0,
                           delta.shape)
        case _:
            return None


def plain(delta: Delta) -> Delta:
    """Return `delta` with every code decoded: what dialects that hold plain tensors write."""
    match delta:
        case Coded():
            b, a, scale = delta.factors()
            return LowRank(a, b, None, scale, delta.shape)
        case LowRank(a=a, b=b, core=core) if any(isinstance(f, Encoded) for f in (a, b, core)):
            core = decoded(core) if core is not None else None
            return LowRank(decoded(a), decoded(b), core, delta.scale, delta.shape)
        case Sparse(indices=Encoded()):
            return replace(delta, indices=delta.places())
        case Sum(terms=terms) if any(plain(t) is not t for t in terms):
            return replace(delta, terms=tuple(plain(t) for t in terms))  # type: ignore[misc]
        case NeedsBase(inner=inner) if inner is not None:
            return replace(delta, inner=plain(inner))  # type: ignore[arg-type]
        case _:
            return delta


def _side(side: LowRank | Dense) -> tuple[Tensor, Tensor]:
    """Return float64 (b, a) with side = b @ a and the smaller inner dimension."""
    if isinstance(side, LowRank):
        return side.factors()
    w = side.dense().flatten(1)
    m, n = w.shape
    eye = torch.eye(min(m, n), dtype=torch.float64)
    return (w, eye) if n <= m else (eye, w)
