"""Which rank where: fixed, by energy, by error, or one byte budget over all modules and singular directions."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adaptc.errors import UsageError

# Ranks for which vLLM has buffers (its --max-lora-rank choices).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def rank_for_energy(s: Tensor, energy: float) -> int:
    """Return the smallest k with sum_{i<k} s_i^2 >= energy * sum s^2, at least 1. s: (r,) descending."""
    kept = torch.cumsum(s.square(), 0)
    if kept[-1] <= 0:
        return 1
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(s))


def rank_for_error(s: Tensor, error: float) -> int:
    """Return the smallest k with sqrt(sum_{i>=k} s_i^2 / sum s^2) <= error, at least 1. s: (r,) descending."""
    tail = torch.flip(torch.cumsum(torch.flip(s.square(), (0,)), 0), (0,))
    if tail[0] <= 0:
        return 1
    return max(int((tail > error**2 * tail[0]).sum()), 1)


def fit_up(rank: int, source: int) -> int:
    """Return the smallest rank vLLM has a buffer for that is >= rank, but not more than the `source` rank."""
    return min(next((r for r in VLLM_RANKS if r >= rank), source), source)


def allocate(
    spectra: Mapping[str, Tensor],
    cost: Mapping[str, int],
    floor: Mapping[str, int],
    size_of: Callable[[Mapping[str, int]], int],
    size: int,
) -> dict[str, int]:
    """Return a rank for every module so that size_of(ranks) <= size, the error removed per byte highest.

    Singular direction i of module M removes s_i^2 of ||dW - dW_k||^2 and costs cost[M] bytes. Directions are taken in
    order of s_i^2 / cost over all modules; s is sorted, so every module keeps a prefix. A direction that no longer fits
    closes its module, cheaper ones may still follow. `size_of` is the exact file size for given ranks, so headers and
    carried tensors count. Raises UsageError if even the floor ranks do not fit.
    """
    ranks = {k: min(floor[k], len(s)) for k, s in spectra.items()}
    least = size_of(ranks)
    if least > size:
        raise UsageError(f"size {size} bytes is below the smallest possible file, {least} bytes",
                         hint="headers and carried tensors (heads, norms) count; --dtype fp16 halves the factors")
    gains = {k: (s.square() / cost[k]).tolist() for k, s in spectra.items()}

    def fill(budget: int) -> dict[str, int]:
        taken, left = dict(ranks), budget
        heap = [(-g[taken[k]], k) for k, g in gains.items() if taken[k] < len(g)]
        heapq.heapify(heap)
        while heap:
            _, key = heapq.heappop(heap)
            if cost[key] > left:
                continue
            left -= cost[key]
            taken[key] += 1
            if taken[key] < len(gains[key]):
                heapq.heappush(heap, (-gains[key][taken[key]], key))
        return taken

    budget = size - least
    while (over := size_of(taken := fill(budget)) - size) > 0:
        budget -= over  # the header grows a little with the ranks: give back exactly what it took
    for _ in range(8):  # what a dialect writes may grow less than the costs say: spend what is left over
        more = fill(budget - over)
        left = size_of(more) - size
        if more == taken or left > 0:
            break
        taken, budget, over = more, budget - over, left
    return taken
