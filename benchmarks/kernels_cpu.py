"""Time the CPU kernels: `python benchmarks/kernels_cpu.py [--threads N] [--out FILE]`, 4096 x 4096, rank 16.

Hot: one layer over and over. Cold: 224 adapters (or as many weights as fit) in turn, so that nothing stays in cache.
Minimum and median of many calls; ratios are of minima. With one thread the clock is the thread's own processor time,
which other processes on a shared machine do not add to; with more it is wall time and needs an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import kernels_path
import torch
from kernels_check import planes
from torch import Tensor

from adaptc.kernels.native import jit, linear
from adaptc.kernels.weight import pack_weight

N, RANK = 4096, 16


def clock(calls: list[Callable[[], Any]], seconds: float = 1.5) -> tuple[float, float]:
    """Minimum and median microseconds of a call, going round the list for a while."""
    for call in calls[:3]:
        call()
    times = []
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    for call in cycle(calls):
        start = now()
        call()
        times.append(now() - start)
        if time.perf_counter() > end:
            break
    times.sort()
    return times[0] * 1e6, times[len(times) // 2] * 1e6


def lora(a: Any, x: Tensor, y: Tensor) -> Tensor:
    """The native adapter alone."""
    return linear.add_adapter(x, a, 1.0, y)


def torch_lora(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The same by torch in float32: shrink, then expand and add."""
    return torch.addmm(y, x @ a, b)


def main() -> None:
    """Measure and print every row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    options = parser.parse_args()
    kernels_path.hide_scripts()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def record(what: str, m: int, times: tuple[float, float]) -> float:
        rows.append({"what": what, "M": m, "min_us": round(times[0], 1), "median_us": round(times[1], 1)})
        print(f"{what:44s} M {m:2d} {times[0]:10.1f} us min {times[1]:10.1f} median", flush=True)
        return times[0]

    ratios: dict[str, float] = {}
    one = planes(N, N, [1] * RANK, "cpu")
    adapters = [type(one)(one.q.clone(), one.p.clone(), one.core.clone(), RANK) for _ in range(224)]
    factors = [(torch.randn(N, RANK), torch.randn(RANK, N)) for _ in range(224)]
    for m in (1, 8):
        x, y = torch.randn(m, N), torch.zeros(m, N)
        for a in adapters:
            linear.prepare(a)
        for name, count in (("hot", 1), ("cold", 224)):
            ours = record(
                f"1-bit adapter, native, {name}", m, clock([partial(lora, a, x, y) for a in adapters[:count]])
            )
            theirs = record(
                f"fp32 adapter, torch, {name}", m, clock([partial(torch_lora, a, b, x, y) for a, b in factors[:count]])
            )
            ratios[f"adapter M={m} {name}: torch / native"] = theirs / ours
    dense = torch.randn(N, N) / 64
    weights = [pack_weight(dense, "nf4") for _ in range(8)]
    for m in (1, 4, 8, 16):
        x = torch.randn(m, N)
        base = record("nf4 base, native", m, clock([partial(linear.base, x, w) for w in weights]))
        both = record(
            "nf4 base + 1-bit adapter, native",
            m,
            clock([partial(linear.linear, x, w, a, 1.0) for w, a in zip(weights, adapters, strict=False)]),
        )
        ratios[f"nf4 + adapter over base M={m}"] = both / base
        plain = record("fp32 base, torch", m, clock([partial(torch.mm, x, dense.t())]))
        ratios[f"torch fp32 over nf4 native M={m}"] = plain / base
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(N, N, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4")
        layer = layer.to("cpu")
        with torch.inference_mode():
            for m in (1, 8):
                x = torch.randn(m, N)
                theirs = record("nf4 base, bitsandbytes on the CPU", m, clock([lambda x=x: layer(x)], 3.0))
                ours = next(r["min_us"] for r in rows if r["what"] == "nf4 base, native" and r["M"] == m)
                ratios[f"bitsandbytes over nf4 native M={m}"] = theirs / ours
    about = {
        "cpu": platform.processor() or platform.machine(), "target": jit.host_target(), "threads": options.threads,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    print(about)
    for name, value in ratios.items():
        print(f"{name:48s} {value:8.2f}")
    if options.out:
        Path(options.out).write_text(json.dumps({"about": about, "rows": rows, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
