"""Importance of every unit of a coupled group: of its weights, on its inputs, under its gradients, to its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.calibration import Calibration
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import NeedsError, UnsupportedError
from adaptc.lowrank import low_rank
from adaptc.prune.groups import ROWS, Coupling, Part

Criterion = Literal["loraprune", "wanda", "magnitude", "adapter"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
_BLOCK = 1 << 22  # entries of a row block held in float64
_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Merged:
    """M = W + dW of the parameters of a base under an adapter, block by block; dW by the base's parameter names."""

    base: Base
    deltas: Mapping[str, Delta]
    shapes: Mapping[str, tuple[int, ...]]  # logical

    def blocks(self, key: str) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (rows, W, dW) of row blocks of parameter `key` in float64, dW None where the adapter has none."""
        shape = self.shapes[key]
        w, delta = self.base.weight(key, shape), self.deltas.get(key)
        b, a, dense = _pieces(key, delta)
        step = max(1, _BLOCK // shape[1])
        for at in range(0, shape[0], step):
            rows = slice(at, min(at + step, shape[0]))
            dw = dense[rows] if dense is not None else b[rows] @ a if b is not None and a is not None else None
            yield rows, w[rows].double(), dw


def merged(base: Base, adapter: Adapter | None, shapes: Mapping[str, tuple[int, ...]]) -> Merged:
    """Return the merged weights. Raises NeedsError or FormatError where the adapter does not fit the base."""
    deltas = {}
    for key, delta in (adapter.deltas if adapter is not None else {}).items():
        base.weight(key, delta.shape)
        deltas[base.name_of(key) or key] = delta
    return Merged(base, deltas, shapes)


def importance(coupling: Coupling, criterion: Criterion, weights: Merged, calibration: Calibration | None = None, *,
               squared: bool = False) -> Tensor:
    """Return the score (units,) in float64 of every unit of a coupled group; the lowest go first.

    With M = W + s B A, and sums over the entries that a unit has of each coupled matrix:
      magnitude   sum M_ij^2 / ||M||^2, summed over matrices
      wanda       sum |M_ij| sqrt(E x_j^2)                            (Sun et al., arXiv 2306.11695)
      loraprune   sum |Ghat_ij M_ij| of the calibration file, or of (Ghat_ij M_ij)^2 where `squared`; Ghat from the
                  gradients of the factors                            (Zhang et al., arXiv 2305.18403)
      adapter     ||s (B A)_unit|| / ||W_unit||, where fine-tuning moved the weights; a hint what to protect rather
                  than a criterion of its own
    All but the first divide the vector of each matrix by its norm before adding, as LoRAPrune does. None depends on
    how a product B A is split. Raises NeedsError for statistics that are missing.
    """
    scores = [_score(part, coupling, criterion, weights, calibration, squared) for part in coupling.weights]
    found: list[Tensor] = [s for s in scores if s is not None]
    if not found:
        names = ", ".join(p.key.split(".")[-2] for p in coupling.weights)
        if criterion == "adapter":
            raise NeedsError(f"{coupling.name}: the adapter changes none of {names}",
                             hint="another --criterion, or --heads-only, --ffn-only for what it does change")
        raise NeedsError(f"{coupling.name}: calibration has no gradients of {names}",
                         hint="adaptc calibrate --gradients with an adapter on them, or --heads-only, --ffn-only")
    return torch.stack(found).sum(0)


def choose(scores: Tensor, keep: int, blocks: int = 1) -> Tensor:
    """Return the sorted units that stay: the keep/blocks highest of each of `blocks` equal runs, first of equals."""
    runs = scores.reshape(blocks, -1)
    order = torch.sort(runs, dim=1, descending=True, stable=True).indices[:, : keep // blocks]
    return (order + torch.arange(blocks)[:, None] * runs.shape[1]).flatten().sort().values


def row_energy(w: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return ||W_i + (B A)_i||^2 (m,) as ||W_i||^2 + 2 b_i (A W_i^T) + b_i (A A^T) b_i^T, without B A."""
    energy = w.square().sum(1) + ((2 * w @ a.mT + b @ (a @ a.mT)) * b).sum(1)
    return energy.clamp(min=0)


def column_energy(w: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return ||W_j + (B A)_j||^2 of every column j (n,), without B A."""
    energy = w.square().sum(0) + ((2 * b.mT @ w + (b.mT @ b) @ a) * a).sum(0)
    return energy.clamp(min=0)


def _score(part: Part, coupling: Coupling, criterion: Criterion, weights: Merged, calibration: Calibration | None,
           squared: bool) -> Tensor | None:
    units = coupling.units
    match criterion:
        case "magnitude":
            energy = _energies(part, weights, base=True, adapter=True)
            return part.sums(energy, units) / max(float(energy.sum()), torch.finfo(torch.float64).tiny)
        case "adapter":
            if part.key not in weights.deltas:
                return None
            moved = part.sums(_energies(part, weights, base=False, adapter=True), units)
            size = part.sums(_energies(part, weights, base=True, adapter=False), units)
            return _unit((moved / size.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
        case "wanda":
            return _unit(part.sums(_felt(part, weights, _statistics(calibration, criterion)), units))
        case _:
            m, n = weights.shapes[part.key]
            seen = _statistics(calibration, criterion).gradient(part.key, (m, n))
            if seen is None:
                return None
            rows, cols = (seen.rows2, seen.cols2) if squared else (seen.rows, seen.cols)
            return _unit(part.sums(rows if part.axis == ROWS else cols, units))


def _unit(scores: Tensor) -> Tensor:
    return scores / (float(scores.norm()) + _EPS)


def _statistics(calibration: Calibration | None, criterion: str) -> Calibration:
    if calibration is None:
        raise NeedsError(f"criterion {criterion} needs calibration statistics",
                         hint="adaptc calibrate --base DIR --data text.txt" + " --adapter A --gradients" * (
                             criterion == "loraprune") + " -o S, then --calibration S")
    return calibration


def _energies(part: Part, weights: Merged, *, base: bool, adapter: bool) -> Tensor:
    """Return the energy of every row or column of W, dW or W + dW, from Grams where dW has factors."""
    w, delta = weights.base.weight(part.key, weights.shapes[part.key]), weights.deltas.get(part.key)
    m, n = weights.shapes[part.key]
    b, a, dense = _pieces(part.key, delta if adapter else None)
    if b is None or a is None:
        b, a = torch.zeros(m, 1, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)
    if not base and dense is None:  # from the r x r Grams alone: the weights are not read
        return (((b @ (a @ a.mT)) * b).sum(1) if part.axis == ROWS else (((b.mT @ b) @ a) * a).sum(0)).clamp(min=0)
    out: list[Tensor] = []
    step = max(1, _BLOCK // n)
    for at in range(0, m, step):
        rows = slice(at, min(at + step, m))
        block = w[rows].double() if base else torch.zeros(rows.stop - at, n, dtype=torch.float64)
        block = block + dense[rows] if dense is not None else block
        out.append((row_energy if part.axis == ROWS else column_energy)(block, b[rows], a))
    return torch.cat(out) if part.axis == ROWS else torch.stack(out).sum(0)


def _felt(part: Part, weights: Merged, calibration: Calibration) -> Tensor:
    """Return sum |M_ij| sqrt(E x_j^2) over every row or column."""
    gram = calibration.gram(part.key, weights.shapes[part.key][1])
    loud = (gram if gram.dim() == 1 else gram.diagonal()).sqrt()
    out: Sequence[Tensor] = []
    for _, w, dw in weights.blocks(part.key):
        m = (w if dw is None else w + dw).abs()
        out = [*out, m @ loud if part.axis == ROWS else m.sum(0) * loud]
    return torch.cat(list(out)) if part.axis == ROWS else torch.stack(list(out)).sum(0)


def _pieces(key: str, delta: Delta | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dW as float64 (B, A, None) with the multiplier in B, as (None, None, dW) where it has no factors."""
    if delta is None:
        return None, None, None
    if isinstance(delta, NeedsBase):
        raise UnsupportedError(f"{key}: {delta.kind} depends on whole rows of the base, which pruning changes",
                               hint="write it as a plain delta first: adaptc run resolve --base DIR IN OUT")
    pair = low_rank(delta)
    return (*pair.factors(), None) if pair is not None else (None, None, delta.dense())
