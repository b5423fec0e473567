"""compare: how adapters relate before anyone merges them, measured from their factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import BaseFree, NeedsBase, Sparse
from adaptc.measure import norm2
from adaptc.passes import Context, one_blas_thread, run
from adaptc.prune.overlap import overlap
from adaptc.report import rank_of
from adaptc.squeeze.align import align
from adaptc.squeeze.joint import Joint, absent, joint, part

# Signs are counted on at most this many evenly spaced rows of dW, 64 rows at a time.
SIGN_ROWS = 512


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters at one parameter, or over all parameters.

    cosine: <dW_i, dW_j> / (||dW_i|| ||dW_j||). conflict: share of entries where both are nonzero that differ in sign;
    0.5 for unrelated deltas. output, input: cosines of the principal angles between the column spaces (row spaces) of
    dW_i and dW_j, descending; empty in totals. shared_output, shared_input: their mean square, the share of the smaller
    space that lies in the other; unrelated spaces of rank r in m dimensions have about r / m.

    Of two sparse deltas the spaces say nothing (NaN, no angles). They have common, the share of the smaller one's
    entries that the other stores too, and awom and awor (adaptc.prune.overlap); None for others.
    """

    cosine: float
    conflict: float
    shared_output: float
    shared_input: float
    output: tuple[float, ...] = ()
    input: tuple[float, ...] = ()
    common: float | None = None
    awom: float | None = None
    awor: float | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """One parameter: ||dW|| and rank of every adapter (0 where it is missing), and every pair that has it."""

    key: str
    norms: tuple[float, ...]
    ranks: tuple[int | None, ...]
    pairs: Mapping[tuple[int, int], Pair]


@dataclass(frozen=True)
class Comparison:
    """All parameters, totals of every pair, notes. `totals` weigh cosine by norms and the rest by parameters."""

    names: tuple[str, ...]
    modules: tuple[Module, ...]
    totals: Mapping[tuple[int, int], Pair]
    notes: tuple[str, ...] = field(default=())


def compare(adapters: Sequence[Adapter], names: Sequence[str], ctx: Context | None = None, any_base: bool = False
            ) -> Comparison:
    """Return how adapters of one base relate, per parameter and in total. Nothing of size (out, in) is formed.

    Base-dependent deltas are compared by their inner part (the direction of DoRA). Raises FormatError for adapters that
    could not be merged: other base models, other shapes, no parameter in common.
    """
    ctx = ctx or Context()
    aligned = align(adapters, names, any_base)
    notes = list(aligned.notes)
    inner = sum(isinstance(d, NeedsBase) for ds in aligned.deltas.values() for d in ds)
    if inner:
        notes.append(f"{inner} deltas change the base weight itself, compared by their low-rank part")

    def one(key: str) -> Module:
        held = aligned.deltas[key]
        free = [d.inner if isinstance(d, NeedsBase) else d for d in held]
        some_sparse = all(d is None or isinstance(d, Sparse) for d in free)
        norms, pairs = _sparse_module(free) if some_sparse else _module(free, ctx.device)
        ranks = tuple(rank_of(d) if d is not None else 0 for d in held)
        return Module(key, norms, ranks, {p: v for p, v in pairs.items() if held[p[0]] and held[p[1]]})

    with one_blas_thread():
        modules = tuple(run(one, list(aligned.deltas), ctx, "compare"))
    totals = {p: _total(modules, p) for p in combinations(range(len(adapters)), 2)}
    return Comparison(tuple(names), modules, totals, tuple(notes))


def _module(free: Sequence[BaseFree | None], device: str) -> tuple[tuple[float, ...], dict[tuple[int, int], Pair]]:
    """Return norms and pairs of one parameter; experts are compared as one long delta, their angles one by one."""
    made = [part(d, device) if d is not None else None for d in free]
    like = next((p for p in made if p is not None), None)
    count = len(free)
    if like is None:
        return (0.0,) * count, {}
    parts = [p or absent(like) for p in made]
    experts = range(like.b.shape[0]) if like.b.dim() == 3 else range(1)
    inner, counts = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, 2)
    angles: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {
        p: ([], []) for p in combinations(range(count), 2)}
    for e in experts:
        frame = joint([p.expert(e) for p in parts])
        inner += torch.einsum("ipq,jpq->ij", frame.cores, frame.cores).cpu()
        counts += signs(frame)
        left, right = zip(*(_spaces(m) for m in frame.cores), strict=True)
        for (i, j), (out, back) in angles.items():
            out.append(cosines(left[i], left[j]))
            back.append(cosines(right[i], right[j]))
    norms = inner.diagonal().sqrt()
    pairs = {}
    for (i, j), found in angles.items():
        flat = [torch.cat(x).sort(descending=True).values.tolist() for x in found]
        shared = [math.fsum(c * c for c in x) / len(x) if x else 0.0 for x in flat]
        length = float(norms[i] * norms[j])
        differ, both = counts[i, j].tolist()
        pairs[i, j] = Pair(float(inner[i, j]) / length if length else 0.0, differ / both if both else 0.0,
                           shared[0], shared[1], tuple(flat[0]), tuple(flat[1]))
    return tuple(norms.tolist()), pairs


def _sparse_module(free: Sequence[BaseFree | None]) -> tuple[tuple[float, ...], dict[tuple[int, int], Pair]]:
    """Return norms and pairs of one parameter that only sparse deltas change."""
    norms = tuple(math.sqrt(norm2(d)) if d is not None else 0.0 for d in free)
    pairs = {}
    for i, j in combinations(range(len(free)), 2):
        x, y = free[i], free[j]
        if isinstance(x, Sparse) and isinstance(y, Sparse):
            o, length = overlap(x, y), norms[i] * norms[j]
            least = min(x.values.numel(), y.values.numel())
            pairs[i, j] = Pair(o.dot / length if length else 0.0, o.conflicts / o.common if o.common else 0.0, math.nan,
                               math.nan, common=o.common / least if least else 0.0, awom=o.awom, awor=o.awor)
    return norms, pairs


def _spaces(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases (p, r), (q, r) of the column and row space of m."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    k = int((s > 1e-6 * s[0]).sum()) if len(s) else 0
    return u[:, :k], vh[:k].mT


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines of the principal angles between the ranges of orthonormal x (p, i), y (p, j), descending."""
    if not x.shape[1] or not y.shape[1]:
        return x.new_zeros(0).cpu()
    values: Tensor = torch.linalg.svdvals(x.mT @ y)
    return values.clamp(max=1.0).cpu()


def signs(frame: Joint) -> Tensor:
    """Return (T, T, 2): how many entries of dW_i and dW_j differ in sign, and how many are both nonzero."""
    m, count = frame.b.shape[0], len(frame.cores)
    rows = torch.linspace(0, m - 1, min(m, SIGN_ROWS)).round().long().to(frame.b.device)
    out = torch.zeros(count, count, 2)
    v = frame.right(torch.eye(frame.cores.shape[2]).to(frame.cores))
    for some in torch.split(rows, 64):
        u = frame.b[some].double() @ frame.map_b
        dw = torch.einsum("rp,tpq,qn->trn", u, frame.cores, v)
        noise = 1e-12 * dw.abs().amax((1, 2), keepdim=True)
        sign = torch.where(dw.abs() > noise, dw.sign(), 0.0).flatten(1)
        agree, both = sign @ sign.mT, sign.abs() @ sign.abs().mT
        out += torch.stack([(both - agree) / 2, both], -1).cpu()
    return out


def _total(modules: Sequence[Module], pair: tuple[int, int]) -> Pair:
    """Return cosine over all parameters as one vector, and the means of the rest over parameters that both have."""
    i, j = pair
    having = [m for m in modules if pair in m.pairs]
    dot = math.fsum(m.pairs[pair].cosine * m.norms[i] * m.norms[j] for m in having)
    length = math.sqrt(math.fsum(m.norms[i] ** 2 for m in modules) * math.fsum(m.norms[j] ** 2 for m in modules))

    def mean(name: str) -> float | None:
        known = [v for m in having if (v := getattr(m.pairs[pair], name)) is not None and not math.isnan(v)]
        return math.fsum(known) / len(known) if known else None

    out, back = (math.nan if having and v is None else v or 0.0 for v in map(mean, ("shared_output", "shared_input")))
    return Pair(dot / length if length else 0.0, mean("conflict") or 0.0, out, back, common=mean("common"),
                awom=mean("awom"), awor=mean("awor"))
