"""Time switching a sparse adapter against fusing factors: `python benchmarks/switch.py [--rounds 15] [--threads 1]`.

Weights of 4096 x 4096, eight in rotation, so that none is in the cache when its turn comes. A round runs every
contestant once, each on another weight than the one before; medians and minima over rounds are printed, because the
machine may be shared, and ratios of medians. Sparse: 1 and 2 % of the entries at random positions.
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

import kernels_path  # noqa: F401
import peft
import torch
from torch import Tensor, nn

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Sparse
from adaptc.kernels import SparseSwitch

N, WEIGHTS = 4096, 8
FUSING = ("W += B @ A, r64", "W.addmm_(B, A), r64", "W.addmm_(B, A), r32")
TARGETS = {torch.float32: {"W.addmm_(B, A), r64": 15, "W += B @ A, r64": 30}, torch.bfloat16: {"W.addmm_(B, A), r64": 5}}


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
        made[f"overwrite {share}, index_copy_"] = lambda i, f=flat, p=index, v=new: f[i].index_copy_(0, p[i], v[i])
        made[f"scatter_ {share}"] = lambda i, f=flat, p=index, v=new: f[i].scatter_(0, p[i], v[i])
        made[f"add {share}, index_add_"] = lambda i, f=flat, p=index, v=new: f[i].index_add_(0, p[i], v[i])
    return made


def switches(weights: list[Tensor]) -> tuple[dict[str, Callable[[int], Any]], list[Any]]:
    """Return SparseSwitch and PEFT on modules over the same weights: apply and restore, merge and unmerge."""
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


def clock(calls: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each call in each round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for r in range(rounds + 1):
        for name, call in calls.items():
            turn += not name.startswith("SparseSwitch")  # its calls follow each other on one weight
            where = (r if name.startswith("SparseSwitch") else turn) % WEIGHTS
            start = time.perf_counter()
            call(where)
            if r:
                times[name].append(1e3 * (time.perf_counter() - start))
            if name.startswith("SparseSwitch"):  # evict what it wrote
                torch.empty(1 << 24).fill_(r)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modules", action=argparse.BooleanOptionalAction, default=True, help="SparseSwitch and PEFT")
    options = parser.parse_args()
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
        print(f"\n{str(dtype)[6:]}, ms: median, minimum (load {os.getloadavg()[0]:.1f})")
        for name, taken in times.items():
            print(f"  {name:42s} {statistics.median(taken):9.3f} {min(taken):9.3f}")
        sparse = times["overwrite 1 %, index_copy_"]
        for name in FUSING:
            ratio, least = statistics.median(times[name]) / statistics.median(sparse), min(times[name]) / min(sparse)
            wanted = targets.get(name)
            verdict = "" if wanted is None else f"  (wanted {wanted}: {'met' if ratio >= wanted else 'MISSED'})"
            print(f"  overwriting 1 % is {ratio:.1f} times faster than {name}, by minima {least:.1f}{verdict}")


if __name__ == "__main__":
    main()
