"""Time one attached layer of 4096 x 4096 on a GPU: `python benchmarks/runtime_gpu_layer.py`.

By wall clock as Python calls it and as a CUDA graph: base, base with adapter, PEFT on bitsandbytes. JSON lines.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import kernels_path
import torch
from torch import nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.kernels.runtime_packed import PackedLinear
from adaptc.kernels.weight import pack_weight
from adaptc.quant.quantize import Quantize


def clock(call: Callable[[], Any], graph: bool) -> float:
    """Median microseconds of a call, by events round 20 calls at a time; as a graph of one call where asked."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    run = call
    if graph:
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            call()
        run = g.replay
    times = []
    for _ in range(40):
        start = time.perf_counter()
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / 20)
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    kernels_path.hide_scripts()
    import bitsandbytes as bnb
    import peft

    n, dtype = 4096, torch.bfloat16
    torch.manual_seed(0)
    w = torch.randn(n, n) / 64

    def packed() -> nn.Module:
        return nn.ModuleDict({"proj": PackedLinear(pack_weight(w, "nf4"), None)}).cuda()

    signs = LowRank(torch.randint(0, 2, (16, n)) * 2.0 - 1, torch.randint(0, 2, (n, 16)) * 2.0 - 1, None, 1e-3, (n, n))
    adapter = Adapter({"proj.weight": signs}, {}, Origin("peft"))
    one, two, three = packed(), packed(), packed()
    adaptc.attach(two, Quantize(method="rd", bits=1.2)(adapter).adapter)
    adaptc.attach(three, adapter)
    four = bnb.nn.Linear4bit(n, n, bias=False, quant_type="nf4", compute_dtype=dtype)
    four.weight = bnb.nn.Params4bit(w.to(dtype), requires_grad=False, quant_type="nf4")
    base = nn.ModuleDict({"proj": copy.deepcopy(four)}).cuda()
    tuned = peft.get_peft_model(nn.ModuleDict({"proj": four}).cuda(), peft.LoraConfig(r=16, target_modules=["proj"]))
    tuned = tuned.base_model.model["proj"]
    for m in (1, 16):
        x = torch.randn(m, n, device="cuda", dtype=dtype)
        calls = {"NF4 base, PackedLinear": lambda x=x: one["proj"](x),
                 "with a coded 1-bit adapter attached": lambda x=x: two["proj"](x),
                 "with a float adapter attached": lambda x=x: three["proj"](x),
                 "bitsandbytes NF4 base": lambda x=x: base["proj"](x), "PEFT on bitsandbytes": lambda x=x: tuned(x)}
        for what, call in calls.items():
            row: dict[str, Any] = {"layer": what, "M": m}
            for name, graph in (("eager_us", False), ("graph_us", True)):
                try:
                    row[name] = round(clock(call, graph), 1)
                except Exception as e:
                    row[name] = f"{type(e).__name__}: {e}"[:160]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
