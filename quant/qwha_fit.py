"""Which coefficients of a change to keep in an orthonormal basis, and with what values: QWHA, arXiv 2509.17428.

With x0 = dw U^T the spectrum of the change and G = U C U^T that of the inputs' second moment, the error at the outputs
of a row is (x0 - f) G (x0 - f)^T for coefficients f. Everything below works on x0 and G alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError

Allocation = Literal["activation", "weight", "even"]
Selection = Literal["energy", "coefficient"]

_ENTRIES = 1 << 18  # of the systems that are solved at once: 2 MiB of float64


def allocate(sizes: Tensor, budget: int, width: int, exponent: float = 1.0) -> Tensor:
    """Return how many coefficients every row gets, (m,) int64 with sum `budget`, each at most `width` (AdaAlloc).

    sizes: ||dw_i X|| (m,) >= 0. p_i = floor(budget s_i / sum s), s_i = sizes^exponent; what rows above `width` cannot
    take is spread evenly over the others, and the rest, fewer than m, goes one by one to the smallest p_i.
    """
    m = len(sizes)
    if not 0 <= budget <= m * width:
        raise UsageError(f"budget of {budget} coefficients does not fit {m} x {width}")
    share = sizes.double() ** exponent
    total = float(share.sum())
    share = share / total if total > 0 else torch.full((m,), 1 / m, dtype=torch.float64)
    counts = (budget * share).floor().long()
    while int(over := (counts - width).clamp(min=0).sum()):
        counts = counts.clamp(max=width)
        room = counts < width
        even = over // int(room.sum())
        counts[room] += even
        if even == 0:
            break
    while (rest := budget - int(counts.sum())) > 0:
        smallest = counts.argsort(stable=True)[: min(rest, int((counts < width).sum()))]
        counts[smallest] += 1
    return counts


def sizes_of(x0: Tensor, through: Tensor, allocation: Allocation) -> Tensor:
    """Return what AdaAlloc divides the budget by: ||dw_i X|| from through = x0 G, ||dw_i||, or ones."""
    if allocation == "activation":
        return (x0 * through).sum(1).clamp(min=0).sqrt()
    return x0.norm(dim=1) if allocation == "weight" else torch.ones(len(x0), dtype=x0.dtype)


def keep(x0: Tensor, gram: Tensor, counts: Tensor, selection: Selection, through: Tensor | None = None,
         rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Return rising flat positions and values (p,) of the counts[i] coefficients kept in each row.

    Selected are the largest |x0_ij| sqrt(G_jj) ("energy") or |x0_ij| ("coefficient"). With through = x0 G, values are
    refined: f_S = argmin (x0 - f) G (x0 - f)^T, that is G_SS f_S = (x0 G)_S by Cholesky; without, they are x0's own.

    With several rounds (and `through`) that chooses counts / rounds; each further round adds as many, those that
    lower the error most on their own, |((x0 - f) G)_ij| / sqrt(G_jj), and refines all. Rows of equal counts are solved
    together, in batches that stay in cache. Raises FormatError where G is not positive.
    """
    (m, n), size = x0.shape, gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    # Entries are looked up in float32, which costs a third and rounds no more than the statistics' own file does.
    table = gram.float() if through is not None else torch.empty(0)
    score = x0.abs() * size if selection == "energy" else x0.abs()
    for i in range(1, rounds):
        assert through is not None, "further rounds need the products of x0 and G"
        at, values = _round(x0, table, -(-counts * i // rounds), score, through)
        f = torch.zeros(m * n, dtype=torch.float32).index_copy_(0, at, values.float()).view(m, n)
        score = torch.sub(through, f @ table, out=score).abs_().div_(size)
        score.view(-1)[at] = torch.inf
    flat, values = _round(x0, table, counts, score, through)
    order = flat.argsort()
    return flat[order], values[order]


def _round(x0: Tensor, table: Tensor, counts: Tensor, score: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return flat positions and values of the counts[i] entries of largest score in each row."""
    n = x0.shape[1]
    places, values = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=x0.dtype)]
    for count in sorted(set(counts.tolist()) - {0}):
        for rows in torch.split((counts == count).nonzero()[:, 0], max(1, _ENTRIES // count**2)):
            at = score[rows].topk(count, 1).indices
            found = x0[rows].gather(1, at) if through is None else _solve(table, through[rows].gather(1, at), at)
            places.append((rows[:, None] * n + at).reshape(-1))
            values.append(found.reshape(-1))
    return torch.cat(places), torch.cat(values)


def _solve(table: Tensor, right: Tensor, at: Tensor) -> Tensor:
    """Solve G_SS f = right for supports at (rows, k), G in `table` (n, n)."""
    n, shape = len(table), (*at.shape, at.shape[1])
    at = at.int() if n * n < 2**31 else at
    system = table.view(-1).index_select(0, ((at * n)[:, :, None] + at[:, None, :]).reshape(-1)).reshape(shape).double()
    lower, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        raise FormatError("statistics are no second moments, their matrix is not positive")
    out: Tensor = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
    return out
