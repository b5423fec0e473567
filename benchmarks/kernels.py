"""Time the GPU kernels against what people run today: `python3 benchmarks/kernels.py --out DIR [--quick]`.

Every figure is the median over replays of one CUDA graph that holds a launch for each of many weights, together larger
than the L2 cache, as the layers of a model are; so launch gaps are small and every weight comes from DRAM.
Correctness first: run kernels_check.py. bitsandbytes and peft are compared where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kernels_path
import torch
import triton
import triton.language as tl
from kernels_check import base, plain, planes
from torch import Tensor

from adaptc.kernels import batch, decode, dora, prefill
from adaptc.kernels.device import compute_type
from adaptc.kernels.prefill.triton import shrink_kernel
from adaptc.kernels.tiles import dot, factor_tile

ROWS: list[dict[str, Any]] = []
DEVICE, BF16 = "cuda", torch.bfloat16
SHAPES = [(4096, 4096), (28672, 8192)]
BATCHES = [1, 4, 16, 64, 512]
COMPILE_ONLY = "--compile" in sys.argv


def clock(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median microseconds of one call, from a CUDA graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    if COMPILE_ONLY:
        return 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    del kept
    return sorted(times)[len(times) // 2]


def copies(nbytes: int) -> int:
    """Return how many of something of this size outgrow the L2 cache several times."""
    return 4 if COMPILE_ONLY else max(4, int(240e6 / nbytes))


def bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read plus written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / (clock([lambda: b.copy_(a)] * 3) * 1e-6)


@triton.jit
def expand_kernel(
    shrunk, p, y, M, N: tl.constexpr, TP: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """y += shrunk p^T: the second of two separate launches, as serving stacks do it today."""
    rows, cols = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    g = tl.zeros((TP, BM), dtype=tl.float32)
    for s in tl.static_range(SLICES):
        g += tl.load(
            shrunk + (s * M + rows[None, :]) * TP + tl.arange(0, TP)[:, None], mask=rows[None, :] < M, other=0.0
        )
    acc = dot(factor_tile(p, cols, N, BN, TP, False, N % BN == 0, DT), g.to(DT), tl.zeros((BN, BM), tl.float32), DT)
    to = y + rows[None, :] * N + cols[:, None]
    tl.store(to, (tl.load(to, mask=rows[None, :] < M) + acc).to(y.dtype.element_ty), mask=rows[None, :] < M)


def separate(x: Tensor, w: Any, a: Any) -> Tensor:
    """Base, then shrink, then expand: three launches of our own kernels."""
    (m, k), n, (tq, tp) = x.shape, w.shape[0], a.core.shape
    y = decode.launch(x, w, None, 1.0)
    slices = 8
    shrunk = torch.empty(slices, m, tp, dtype=torch.float32, device=x.device)
    shrink_kernel[(-(-m // 64), slices)](
        x, a.q, a.core, 1.0, shrunk, x, m, k, K=k, KP=k, TQ=tq, TP=tp, PACKED=False, SLICES=slices, KQ=k // slices,
        SORT=False, BM=64, BQ=64, DT=compute_type(x), ASM=False, num_warps=4, num_stages=3,
    )  # fmt: skip
    expand_kernel[(-(-n // 64),)](
        shrunk, a.p, y, m, N=n, TP=tp, SLICES=slices, BM=max(16, triton.next_power_of_2(m)), BN=64, DT=compute_type(x)
    )
    return y


def peft_layers(n: int, k: int, rank: int, count: int) -> list[Any] | None:
    """Return PEFT LoRA layers over bitsandbytes NF4 linears, or None where either is missing."""
    try:
        import bitsandbytes as bnb
        import peft
    except ImportError as missing:
        print("no peft on bitsandbytes:", missing)
        return None
    layers = []
    for _ in range(count):
        linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=BF16, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(torch.randn(n, k, dtype=BF16), requires_grad=False, quant_type="nf4")
        model = torch.nn.ModuleDict({"proj": linear.to(DEVICE)})
        config = peft.LoraConfig(r=rank, target_modules=["proj"], init_lora_weights=False)
        layers.append(peft.get_peft_model(model, config).base_model.model["proj"].to(BF16).eval())
    return layers


def record(what: str, m: int, n: int, k: int, us: float, needed: int, of: float | None, rate: float) -> float:
    """Print and keep one row: bytes that must move over the copy rate, and the time over the base's."""
    row = {"what": what, "M": m, "N": n, "K": k, "us": round(us, 2), "roof": round(needed / rate * 1e6 / us, 3)}
    row["of_base"] = None if of is None else round(us / of, 3)
    ROWS.append(row)
    print(
        f"{what:34s} M {m:4d} {n}x{k} {us:9.2f} us  {row['roof']:.2f} of copy rate  {row['of_base']} x base", flush=True
    )
    return us


def each(call: Callable[..., Any], *lists: list[Any]) -> list[Callable[[], Any]]:
    """Return a call for every position of the lists, as far as the shortest goes."""
    return [partial(call, *items) for items in zip(*lists, strict=False)]


def linears(rate: float, quick: bool) -> None:
    """One adapter: every baseline on every shape."""
    for n, k in SHAPES:
        count = copies(n * k // 2)
        ranks = (16,) if quick else (8, 16, 64)
        ws = [base(n, k, "nf4", BF16, DEVICE) for _ in range(count)]
        ones = {r: [planes(n, k, [1] * r, DEVICE) for _ in range(count)] for r in ranks}
        halves = {r: [plain(n, k, r, BF16, DEVICE) for _ in range(count)] for r in ranks}
        layers = peft_layers(n, k, 16, count)
        for m in BATCHES:
            one_shape(m, n, k, ws, ones, halves, layers, rate)
        if not quick and n == 4096:
            compiled(ws[:4], halves[16][:4], n, k, rate)
        del ws, ones, halves, layers
        torch.cuda.empty_cache()


def one_shape(
    m: int, n: int, k: int, ws: list[Any], ones: dict[int, Any], halves: dict[int, Any], layers: Any, rate: float
) -> None:
    """Every way to run one layer shape at one number of rows."""
    xs = [torch.randn(m, k, dtype=BF16, device=DEVICE) for _ in ws]
    launch = decode.launch if m <= decode.MAX_ROWS else prefill.launch
    lone, needed = [None] * len(ws), ws[0].nbytes + xs[0].nbytes + m * n * 2

    def op(x: Tensor, w: Any, a: Any) -> Tensor:
        return launch(x, w, a, 1.0)

    b = record("nf4 base alone", m, n, k, clock(each(op, xs, ws, lone)), needed, None, rate)
    for kind, sets in (("1-bit", ones), ("bf16", halves)):
        for r, adapters in sets.items():
            if r == 16 or m in (1, 16):
                us = clock(each(op, xs, ws, adapters))
                record(f"nf4 + {kind} r{r}, fused", m, n, k, us, needed + adapters[0].nbytes, b, rate)
    factors = halves[16][0].nbytes
    if m <= 64:
        us = clock(each(separate, xs, ws, halves[16]))
        record("nf4 + bf16 r16, three launches", m, n, k, us, needed + factors, b, rate)
    if layers is not None:
        with torch.inference_mode():
            us = clock(each(lambda layer, x: layer(x), layers, xs))
        record("peft on bitsandbytes nf4, r16", m, n, k, us, needed + factors, b, rate)
    dense = [torch.randn(n, k, dtype=BF16, device=DEVICE) for _ in range(4)]
    pairs = [(a.q[:16].t().contiguous(), a.p[:16].contiguous()) for a in halves[16][:4]]
    us = clock(each(lambda x, d, f: torch.addmm(x @ d.t(), x @ f[0], f[1]), xs, dense, pairs))
    record("bf16 base, plain GEMMs, r16", m, n, k, us, dense[0].nbytes + xs[0].nbytes, b, rate)


def compiled(ws: list[Any], adapters: list[Any], n: int, k: int, rate: float) -> None:
    """torch.compile of the specification: dequantise, then three products."""
    from adaptc.kernels.decode import naive

    fused = torch.compile(naive.linear)
    for m in (1, 16):
        xs = [torch.randn(m, k, dtype=BF16, device=DEVICE) for _ in ws]
        try:
            us = clock(each(lambda x, w, a: fused(x, w, a, 1.0), xs, ws, adapters))
        except Exception as failed:  # a compiler's failure is a result here, not an end
            print("torch.compile:", str(failed)[:200])
            return
        record("torch.compile of the naive form", m, n, k, us, ws[0].nbytes, None, rate)


def many(rate: float) -> None:
    """32 distinct adapters, a row each."""
    for n, k in SHAPES:
        count = copies(n * k // 2)
        ws = [base(n, k, "nf4", BF16, DEVICE) for _ in range(count)]
        xs = [torch.randn(32, k, dtype=BF16, device=DEVICE) for _ in range(count)]
        needed = ws[0].nbytes + xs[0].nbytes + 64 * n
        us = clock(each(lambda x, w: decode.launch(x, w, None, 1.0), xs, ws))
        b = record("nf4 base alone", 32, n, k, us, needed, None, rate)
        for kind in ("1-bit", "bf16"):
            one = planes(n, k, [1] * 16, DEVICE) if kind == "1-bit" else plain(n, k, 16, BF16, DEVICE)
            pool = batch.Pool(4 * 32 * 2000, 4 * 32, DEVICE, BF16, 2048)
            rows = [batch.batch([pool.put(one, 1.0) for _ in range(32)], DEVICE) for _ in range(4)]
            us = clock(each(batch.launch, xs, ws, [pool] * count, rows * count, [None] * count))
            record(f"nf4 + 32 distinct {kind} r16", 32, n, k, us, needed + 32 * one.nbytes, b, rate)


def composed(rate: float) -> None:
    """DoRA's output step, ours against PEFT's expression."""
    for m, n in ((16, 4096), (512, 4096), (4096, 4096)):
        count = copies(4 * m * n)
        bases, deltas = ([torch.randn(m, n, dtype=BF16, device=DEVICE) for _ in range(count)] for _ in range(2))
        gains = [torch.rand(n, device=DEVICE)] * count
        rounded = [gains[0].to(BF16).view(1, -1)] * count
        theirs = clock(each(lambda b, d, g: b + ((g - 1) * b + g * d * 0.5), bases, deltas, rounded))
        ours = clock(each(lambda b, d, g: dora.launch_compose(b, d, g, None, 0.5), bases, deltas, gains))
        record("dora compose, peft's expression", m, n, 0, theirs, 6 * m * n, None, rate)
        record("dora compose, one kernel", m, n, 0, ours, 6 * m * n, theirs, rate)


def main() -> None:
    """Run everything; write rows as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--quick", action="store_true", help="rank 16 only, no torch.compile")
    parser.add_argument("--compile", action="store_true", help="fill Triton's cache, time nothing")
    parser.add_argument("--only", default="", help="for --compile: SHAPE,M or 'rest'")
    options = parser.parse_args()
    kernels_path.hide_scripts()
    if options.only and options.only != "rest":
        shape, m = (int(part) for part in options.only.split(","))
        SHAPES[:], BATCHES[:] = [SHAPES[shape]], [m]
        linears(1.0, options.quick)
        return
    torch.manual_seed(0)
    rate = bandwidth()
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": sys.version.split()[0], "copy_GBs": round(rate / 1e9),
    }  # fmt: skip
    print(about, flush=True)
    parts = [lambda: many(rate), lambda: composed(rate), lambda: linears(rate, options.quick)]
    for part in parts[:2] if options.only else parts:
        part()
        (Path(options.out) / "kernels.json").write_text(json.dumps({"about": about, "rows": ROWS}, indent=1))


if __name__ == "__main__":
    main()
