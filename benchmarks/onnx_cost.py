"""What an adapter costs in ONNX Runtime on a CPU: a token, load, memory; 2048 x 2048, rank 16, one thread.

python benchmarks/onnx_cost.py [--rounds N]
Times: the least CPU time of a call; ratios: the median over rounds of ratios to the fp32 branch in the same round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.formats.onnx.adapter_file import read_adapter_file
from adaptc.formats.onnx.export import Plan, export
from adaptc.formats.onnx.model import open_model
from adaptc.passes import Context
from adaptc.quant.quantize import Quantize

N, RANK = 2048, 16
NO_FOLDING = ("optimization.disable_specified_optimizers", "ConstantFolding")


def adapters() -> dict[str, Adapter]:
    """Return a float adapter of one module and its 1-bit code."""
    g = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(RANK, N, generator=g) / 45, torch.randn(N, RANK, generator=g) / 45, None, 1.0, (N, N))
    plain = Adapter({"proj.weight": low}, {}, Origin("peft"))
    return {"plain": plain, "coded": Quantize(method="bilora", bits=1.0)(plain, Context()).adapter}


def base(path: Path) -> Path:
    """Write a model of one product."""
    w = (np.random.default_rng(0).standard_normal((N, N)) / 45).astype(np.float32)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "proj.weight"], ["y"])], "one",
                              [helper.make_tensor_value_info("x", 1, ["batch", N])],
                              [helper.make_tensor_value_info("y", 1, ["batch", N])],
                              [numpy_helper.from_array(w, "proj.weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def variants(work: Path) -> dict[str, tuple[Path, Path | None, bool]]:
    """Return name -> (model, what feeds it, whether constants are folded)."""
    made, source = adapters(), base(work / "model.onnx")
    plans = {
        "slots fp32, .onnx_adapter": ("plain", Plan("optional", name="a")),
        "slots fp32, fed by the expander": ("coded", Plan("required", expander=True)),
        "merged on disk": ("plain", Plan(merge="disk")), "merged at load": ("coded", Plan(merge="load")),
        "1-bit slots (sign)": ("plain", Plan("optional", store="sign", name="a")),
        "int8 slots": ("plain", Plan("optional", store="int8", name="a")),
        "nf4 slots": ("plain", Plan("optional", store="nf4", name="a")),
    }
    out: dict[str, tuple[Path, Path | None, bool]] = {"base": (source, None, True)}
    for name, (which, plan) in plans.items():
        folder = work / name.replace(" ", "-")
        folder.mkdir()
        export(made[which], open_model(source), folder, plan)
        fed = [p for p in sorted(folder.iterdir()) if p.suffix == ".onnx_adapter" or p.name == "expander.onnx"]
        out[name] = (folder / "model.onnx", fed[0] if fed else None, True)
    slots, file, _ = out["slots fp32, .onnx_adapter"]
    out["fp32 branch, constants"] = (constants(slots, file, work / "constants.onnx"), None, True)
    signs, file, _ = out["1-bit slots (sign)"]
    fixed = constants(signs, file, work / "signs.onnx")
    out["1-bit constants, folded"], out["1-bit constants, not folded"] = (fixed, None, True), (fixed, None, False)
    return out


def constants(model: Path, file: Path | None, out: Path) -> Path:
    """Write a model with slots again, an adapter's arrays in them for good."""
    assert file is not None
    arrays, proto = read_adapter_file(file), onnx.load(model)
    kept = [t for t in proto.graph.initializer if t.name not in arrays]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *(numpy_helper.from_array(a, n) for n, a in arrays.items())])
    inputs = [i for i in proto.graph.input if i.name not in arrays]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    onnx.save(proto, out)
    return out


def open_session(model: Path, folding: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if not folding:
        options.add_session_config_entry(*NO_FOLDING)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def caller(model: Path, fed: Path | None, folding: bool, batch: int) -> Any:
    """Return a function that runs one step, inputs bound as the variant takes them."""
    session, x = open_session(model, folding), np.random.default_rng(1).standard_normal((batch, N)).astype(np.float32)
    feed, run = {"x": ort.OrtValue.ortvalue_from_numpy(x)}, ort.RunOptions()
    if fed is not None and fed.suffix == ".onnx_adapter":
        held = ort.LoraAdapter()
        held.Load(str(fed))
        run.add_active_adapter(held)
        return lambda: session.run(None, {"x": x}, run), held
    if fed is not None:
        expander = open_session(fed, True)
        names = [o.name for o in expander.get_outputs()]
        feed |= {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in zip(names, expander.run(None, {}), strict=True)}
    return lambda: session.run_with_ort_values(["y"], feed, run), session


def measured(steps: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return seconds of CPU time by variant, the least of five calls in every round.

    Variants take turns, so that what else runs on the machine hits all alike; ratios are taken within a round.
    """
    out: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, _held) in steps.items():
            best = float("inf")
            for _ in range(5):
                start = time.thread_time()
                step()
                best = min(best, time.thread_time() - start)
            out[name].append(best)
    return out


def resident(model: Path, fed: Path | None, folding: bool) -> tuple[float, float]:
    """Return milliseconds to load and MiB that a fresh process grew by, after one step."""
    arguments = [str(model), str(fed or ""), str(int(folding))]
    said = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=True)
    load, grown = said.stdout.split()
    return float(load), float(grown)


def child(model: str, fed: str, folding: str) -> None:
    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, start = rss(), time.perf_counter()
    step, _ = caller(Path(model), Path(fed) if fed else None, folding == "1", 1)
    loaded = time.perf_counter() - start
    step()
    print(loaded * 1e3, (rss() - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory() as temp:
        made = variants(Path(temp))
        times: dict[str, list[tuple[float, float]]] = {}
        for batch in (1, 16):
            rounds = measured({name: caller(*v, batch) for name, v in made.items()}, given.rounds)
            against = np.array(rounds["fp32 branch, constants"])
            for name, each in rounds.items():
                times.setdefault(name, []).append((min(each) * 1e6, float(np.median(np.array(each) / against))))
        size = made["base"][0].stat().st_size
        print("| variant | b=1 us | x fp32 branch | b=16 us | x fp32 branch | graph + KB | fed KB | load ms | "
              "resident MiB |\n|---|---|---|---|---|---|---|---|---|")
        for name, (model, fed, folding) in made.items():
            load, grown = resident(model, fed, folding)
            (one, one_times), (sixteen, sixteen_times) = times[name]
            print(f"| {name} | {one:.0f} | {one_times:.2f} | {sixteen:.0f} | {sixteen_times:.2f} | "
                  f"{(model.stat().st_size - size) / 1e3:.1f} | {fed.stat().st_size / 1e3 if fed else 0:.1f} | "
                  f"{load:.0f} | {grown:.0f} |")


if __name__ == "__main__":
    main()
