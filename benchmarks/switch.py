"""Time switching a sparse adapter against fusing factors: `python benchmarks/switch.py [--rounds 15] [--threads 1]`.

Weights of 4096 x 4096, eight in rotation, so that none is in the cache when its turn comes. A round runs every
contestant once, each on another weight than the one before; medians and minima over rounds are printed, and ratios of
medians, by the clock and in processor time, which on a shared machine is fairer. Sparse: 1 and 2 % of the entries,
drawn at random.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import kernels_path
import torch
from torch import Tensor, nn

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Sparse
from adaptc.kernels import SparseSwitch
from adaptc.kernels.sparse import native

N, WEIGHTS = 4096, 8
FUSING = ("W += B @ A, r64", "W.addmm_(B, A), r64", "W.addmm_(B, A), r32")
TARGETS = {torch.float32: {FUSING[1]: 15, FUSING[0]: 30}, torch.bfloat16: {FUSING[1]: 5}}


def positions(density: float, seed: int) -> Tensor:
    """Return sorted random positions, the same count for every seed."""
    random = torch.Generator().manual_seed(seed)
    return torch.randperm(N * N, generator=random)[: round(density * N * N)].sort().values


def fuse(w: Tensor, b: Tensor, a: Tensor) -> None:
    w += b @ a


def contestants(weights: list[Tensor]) -> dict[str, Callable[[int], Any]]:
    """Return what is timed, each a call on weight number i."""
    dtype = weights[0].dtype
    b, a = torch.randn(N, 64, dtype=dtype) / 64, torch.randn(64, N, dtype=dtype) / 64
    made: dict[str, Callable[[int], Any]] = {
        FUSING[0]: lambda i: fuse(weights[i], b, a),
        FUSING[1]: lambda i: weights[i].addmm_(b, a),
        FUSING[2]: lambda i: weights[i].addmm_(b[:, :32], a[:32]),
    }
    for density in (0.01, 0.02):
        index = [positions(density, i) for i in range(WEIGHTS)]
        new = [torch.randn(len(index[0]), dtype=dtype) for _ in range(WEIGHTS)]
        flat = [w.view(-1) for w in weights]
        share = f"{100 * density:g} %"
        ready = [native.packed(f, p) for f, p in zip(flat, index, strict=True)]
        made[f"overwrite {share}"] = lambda i, f=flat, p=ready, v=new: native.put(f[i], p[i], v[i])
        made[f"index_copy_ {share}"] = lambda i, f=flat, p=index, v=new: f[i].index_copy_(0, p[i], v[i])
        made[f"scatter_ {share}"] = lambda i, f=flat, p=index, v=new: f[i].scatter_(0, p[i], v[i])
        made[f"index_add_ {share}"] = lambda i, f=flat, p=index, v=new: f[i].index_add_(0, p[i], v[i])
    return made


def switches(weights: list[Tensor]) -> tuple[dict[str, Callable[[int], Any]], list[Any]]:
    """Return SparseSwitch and PEFT on modules over the same weights: apply and restore, merge and unmerge."""
    import peft

    dtype, index = weights[0].dtype, [positions(0.01, i) for i in range(2)]
    layers = []
    for w in weights:
        layer = nn.Linear(N, N, bias=False, device="meta")
        layer.weight = nn.Parameter(w, requires_grad=False)
        layers.append(layer)
    ready = []
    for layer in layers:
        some = {n: Adapter({"up.weight": Sparse(p, torch.randn(len(p)) / 64, 1.0, (N, N))}, {}, Origin("peft"))
                for n, p in zip("ab", index, strict=True)}
        switch = SparseSwitch(nn.ModuleDict({"up": layer}), some)
        for name in "ab":  # plans both
            switch.apply(name)
        switch.restore()
        ready.append(switch)
    made: dict[str, Callable[[int], Any]] = {
        "SparseSwitch.apply 1 %": lambda i: ready[i].apply("a"),
        "SparseSwitch, from one to another 1 %": lambda i: ready[i].apply("b"),
        "SparseSwitch.restore 1 %": lambda i: ready[i].restore(),
    }
    # 20 (4096 + 4096) entries are 0.98 %
    for name, config in (("PEFT LoRA r64", peft.LoraConfig(r=64, target_modules=["up"])),
                         ("PEFT SHIRA 1 %", peft.ShiraConfig(r=20, target_modules=["up"], init_weights=False))):
        layer = nn.Linear(N, N, bias=False, dtype=dtype)
        tuned = peft.get_peft_model(nn.ModuleDict({"up": layer}), config).base_model.model["up"]
        made[f"{name} merge"] = lambda i, t=tuned: t.merge()
        made[f"{name} unmerge"] = lambda i, t=tuned: t.unmerge()
    return made, ready


def clock(calls: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) milliseconds of each call in each round; the first round is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    turn = 0
    for r in range(rounds + 1):
        for name, call in calls.items():
            turn += not name.startswith("SparseSwitch")  # its calls follow each other on one weight
            where = (r if name.startswith("SparseSwitch") else turn) % WEIGHTS
            start, spent = time.perf_counter(), time.process_time()
            call(where)
            spent = time.process_time() - spent
            if r:
                times[name].append((1e3 * (time.perf_counter() - start), 1e3 * spent))
            if name.startswith("SparseSwitch"):  # evict what it wrote
                torch.empty(1 << 24).fill_(r)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modules", action=argparse.BooleanOptionalAction, default=True, help="SparseSwitch and PEFT")
    options = parser.parse_args()
    kernels_path.hide_scripts()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, peft {version('peft')}, {options.threads} threads of {os.cpu_count()} on "
          f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    for dtype, targets in TARGETS.items():
        weights = [torch.randn(N, N, dtype=dtype) / 64 for _ in range(WEIGHTS)]
        times = clock(contestants(weights), options.rounds)
        if options.modules:
            calls, _ = switches(weights)
            times |= clock(calls, options.rounds)
        print(f"\n{str(dtype)[6:]}, ms: median and minimum of the clock, median of processor time "
              f"(load {os.getloadavg()[0]:.1f})")
        for name, taken in times.items():
            wall, spent = zip(*taken, strict=True)
            print(f"  {name:42s} {statistics.median(wall):9.3f} {min(wall):9.3f} {statistics.median(spent):9.3f}")
        sparse = list(zip(*times["overwrite 1 %"], strict=True))
        for name in FUSING:
            dense = zip(*times[name], strict=True)
            ratios = [statistics.median(d) / statistics.median(s) for d, s in zip(dense, sparse, strict=True)]
            wanted = targets.get(name)
            verdict = "" if wanted is None else f"  (wanted {wanted}: {'met' if ratios[0] >= wanted else 'MISSED'})"
            print(f"  overwriting 1 % is {ratios[0]:.1f} times faster than {name}, {ratios[1]:.1f} in processor "
                  f"time{verdict}")


if __name__ == "__main__":
    main()
