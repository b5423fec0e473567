"""Compression against the usual tools' ways, in one run: python benchmarks/compress.py

Part 1: one 4096 x 4096 module, r64 -> 8: adaptc's truncation against a full SVD of B A (as kohya and PEFT do) and
torch.svd_lowrank.
Part 2: `adaptc compress --rank 8` on a Llama-2-7B-shaped r64 adapter (224 modules, about 640 MB) made here, against
`cp` of the same file plus the import of torch; anonymous memory against that of the import.
Part 3: start-up of `adaptc --help` and `adaptc --version`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from adaptc.squeeze.factored import truncate
from adaptc.tensorfile import write_tensors

ADAPTC = str(Path(sys.executable).parent / "adaptc")
LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
         "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
         "mlp.down_proj": (4096, 11008)}


def seconds(work: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def one_module(full: bool) -> list[tuple[str, float, str]]:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=g)
    b = torch.randn(4096, 64, generator=g) / torch.arange(1, 65) @ mix
    a = torch.linalg.solve(mix, torch.randn(64, 4096, generator=g))
    ours = seconds(lambda: truncate(b.double(), a.double(), 8), 15)
    rows = [("adaptc truncate (float64)", ours, "1x")]
    low = seconds(lambda: torch.svd_lowrank(b @ a, q=16, niter=4), 5)  # noqa: TID251 - the competitor
    rows.append(("torch.svd_lowrank(B A, q=16, niter=4)", low, f"{low / ours:.0f}x"))
    if full:
        svd = seconds(lambda: torch.linalg.svd(b @ a, full_matrices=False), 1)
        rows.append(("torch.linalg.svd(B A)", svd, f"{svd / ours:.0f}x"))
    return rows


def make_adapter(folder: Path, rank: int = 64) -> Path:
    g = torch.Generator().manual_seed(1)
    decay = torch.arange(1, rank + 1) ** -0.7
    tensors = {}
    for layer in range(32):
        for name, (m, n) in LLAMA.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, n, generator=g) / 64
            tensors[f"{stem}.lora_B.weight"] = torch.randn(m, rank, generator=g) * decay / 64
    folder.mkdir()
    with (folder / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(
        '{"peft_type":"LORA","r":64,"lora_alpha":128,"target_modules":["q_proj"],"base_model_name_or_path":"llama-2-7b"}')
    return folder


def watch(command: list[str]) -> tuple[float, int]:
    """Run a command; return wall seconds and the peak anonymous memory in bytes."""
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            line = next((x for x in status.splitlines() if x.startswith("RssAnon")), None)
            peak = max(peak, int(line.split()[1]) * 1024 if line else 0)

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    wall = time.perf_counter() - start
    done.set()
    sampler.join()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}")
    return wall, peak


def whole_adapter(repeat: int) -> list[tuple[str, float, str]]:
    with tempfile.TemporaryDirectory() as temp:
        source = make_adapter(Path(temp) / "llama-r64")
        file, copy, out = source / "adapter_model.safetensors", Path(temp) / "copy", Path(temp) / "out"
        imports = [watch([sys.executable, "-c", "import torch"]) for _ in range(repeat)]
        copies, runs = [], []
        for _ in range(repeat):
            copies.append(watch(["cp", str(file), str(copy)])[0])
            copy.unlink()
            runs.append(watch([ADAPTC, "compress", str(source), "-o", str(out), "--rank", "8", "--json"]))
            shutil.rmtree(out)
        nbytes = file.stat().st_size
    imported, cp, wall = (statistics.median(x) for x in ([i[0] for i in imports], copies, [r[0] for r in runs]))
    memory = max(r[1] for r in runs) - max(i[1] for i in imports)
    return [(f"cp of {nbytes / 1e6:.0f} MB", cp, ""), ("import torch", imported, ""),
            ("adaptc compress --rank 8", wall, f"{(wall - imported) / cp:.2f} x cp beyond the import"),
            ("3 x cp + import, the bound", 3 * cp + imported,
             f"anonymous memory beyond the import: {memory / 1e6:.0f} MB")]


def start_up() -> list[tuple[str, float, str]]:
    def run(flag: str) -> None:
        subprocess.run([ADAPTC, flag], check=True, capture_output=True)

    return [(f"adaptc {flag}", seconds(partial(run, flag), 9), "") for flag in ("--help", "--version")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-dense", action="store_true", help="leave out the full SVD (about 20 s)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores {platform.machine()}")
    parts = (("4096 x 4096, r64 -> 8", one_module(not args.no_dense)),
             ("Llama-2-7B shape, r64 -> 8, end to end", whole_adapter(args.repeat)), ("start-up", start_up()))
    for title, rows in parts:
        print(f"\n{title}")
        for name, value, note in rows:
            print(f"  {name:<40} {value * 1e3:>10.1f} ms  {note}")


if __name__ == "__main__":
    main()
