"""A fleet on this machine: python benchmarks/fleet.py [--count 2000] [--folder DIR] [--recipe SPEC]

Adapters of rank 16 on q, k, v, o of a 1B Llama (16 layers, hidden 2048, 6.8 MB in fp16), made from a real one (the
bundled docstrings adapter: its factors tiled to the shapes) times noise of 5 %, each with its own seed. They are made
in chunks (--chunk, 680 MB at 100) just before they are read and deleted after, so that the disk holds them; making
them is not timed. Starting workers is not timed either: each engine first does four adapters.

Part 1: adapters a second of `local` and `ray` with 1 and 2 workers, in the order local 1, local 2, ray 1, ray 2 and
back again, so that a drift of the machine cancels. `local` with 2 workers does --count adapters, the others an eighth.
Part 2: what a fleet costs beside the work, with a recipe that changes nothing on adapters of two modules.
Part 3: `adaptc batch` killed (SIGKILL) in the middle and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import adaptc
from adaptc.cli.pace import clock
from adaptc.delta import LowRank
from adaptc.evidence.fleet import Engine, order_of, plan, run
from adaptc.evidence.fleet_find import find
from adaptc.evidence.fleet_local import Local
from adaptc.evidence.fleet_ray import Ray
from adaptc.evidence.fleet_work import Result
from adaptc.evidence.manifest import manifest_of
from adaptc.factor import decoded
from adaptc.tensorfile import write_tensors

ADAPTC = str(Path(sys.executable).parent / "adaptc")
REAL = Path(__file__).resolve().parents[1] / "examples" / "docstrings-adapter"
SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}
LAYERS, RANK = 16, 16
NO_CHANGE = "truncate{rank=16}"


def template(shapes: dict[str, tuple[int, int]], layers: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a PEFT adapter of these shapes: factors of a real one, tiled."""
    real = [d for d in adaptc.load(REAL).deltas.values() if isinstance(d, LowRank)]
    tensors = {}
    for layer in range(layers):
        for i, (name, (m, n)) in enumerate(shapes.items()):
            delta = real[(layer * len(shapes) + i) % len(real)]
            a, b = (decoded(f).float() for f in (delta.a, delta.b))
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = a[:RANK].repeat(1, -(-n // a.shape[1]))[:, :n].contiguous()
            tensors[f"{stem}.lora_B.weight"] = b[:, :RANK].repeat(-(-m // b.shape[0]), 1)[:m].contiguous()
    return tensors


def make(folder: Path, seeds: range, shapes: dict[str, tuple[int, int]] = SHAPES, layers: int = LAYERS) -> Path:
    """Write one PEFT folder for every seed: the template times 1 + 0.05 times noise."""
    plain = template(shapes, layers)
    noise = 1 + 0.05 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": "llama-1b"}
    for seed in seeds:
        at = torch.randint(0, 1 << 20, (len(plain),), generator=torch.Generator().manual_seed(seed)).tolist()
        tensors = {k: (t * noise[p : p + t.numel()].view_as(t)).half() for p, (k, t) in zip(at, plain.items(),
                                                                                            strict=True)}
        target = folder / f"{seed // 100:03}" / f"adapter-{seed:05}"
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text(json.dumps(config))
        with (target / "adapter_model.safetensors").open("wb") as f:
            write_tensors(f, tensors, {"format": "pt"})
    return folder


@dataclass
class Measured:
    """Seconds and results of one engine, over all chunks it did."""

    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.results) / self.seconds

    @property
    def beside(self) -> float:
        """Seconds an adapter that were not spent in the adapter's own work, for one worker."""
        return (self.seconds - sum(r.seconds for r in self.results)) / len(self.results)


def done(recipe: str, library: Path, out: Path, engine: Engine, measured: Measured | None) -> None:
    """Run a recipe over a library; add to `measured` unless this is for warming up. Exits where anything failed."""
    with manifest_of(str(out)) as manifest:
        planned = plan(find([f"{library}/**/"], str(out)), order_of(recipe), str(out), manifest.history)
        start = time.perf_counter()
        results = list(run(planned, str(out), manifest, engine))
        seconds = time.perf_counter() - start
    failed = [r for r in results if r.status != "done"]
    if failed:
        sys.exit(f"{failed[0].input}: {failed[0].status} {failed[0].reason}")
    if measured is not None:
        measured.seconds += seconds
        measured.results += results
    shutil.rmtree(out)


def visit(engine: Engine, recipe: str, seeds: range, chunk: int, folder: Path, measured: Measured) -> None:
    """Start an engine, warm it up, and have it do the adapters of `seeds` chunk by chunk."""
    with engine:
        warm = make(folder / "warm", range(4))
        done(recipe, warm, folder / "out", engine, None)
        shutil.rmtree(warm)
        for at in range(seeds.start, seeds.stop, chunk):
            library = make(folder / "library", range(at, min(at + chunk, seeds.stop)))
            os.sync()  # or the first outputs that are flushed to disk would wait for all inputs to be
            done(recipe, library, folder / "out", engine, measured)
            shutil.rmtree(library)


def throughput(count: int, chunk: int, recipe: str, folder: Path) -> dict[tuple[str, int], Measured]:
    share = {("local", 1): count // 8, ("local", 2): count, ("ray", 1): count // 8, ("ray", 2): count // 8}
    engines: dict[str, Callable[[int], Engine]] = {"local": Local, "ray": Ray}
    measured = {key: Measured() for key in share}
    for order, half in ((list(share), 0), (list(share)[::-1], 1)):
        for name, jobs in order:
            many = share[name, jobs]
            seeds = range(many // 2) if half == 0 else range(many // 2, many)
            start = time.perf_counter()
            visit(engines[name](jobs), recipe, seeds, chunk, folder, measured[name, jobs])
            print(f"  {name} {jobs}: {len(seeds)} adapters, {time.perf_counter() - start:.0f} s with making them",
                  file=sys.stderr, flush=True)
    return measured


def overhead(count: int, folder: Path) -> dict[str, Measured]:
    measured = {}
    for name, engine in (("local", Local(1)), ("ray", Ray(1))):
        measured[name] = Measured()
        with engine:
            for first in (True, False):
                tiny = make(folder / "tiny", range(8 if first else count), {"q_proj": (64, 64), "v_proj": (64, 64)}, 1)
                done(NO_CHANGE, tiny, folder / "out", engine, None if first else measured[name])
                shutil.rmtree(tiny)
    return measured


def lines(manifest: Path) -> Iterator[dict[str, str]]:
    for text in manifest.read_bytes().split(b"\n")[:-1] if manifest.exists() else ():
        yield json.loads(text)


def killed(count: int, jobs: int, recipe: str, folder: Path) -> str:
    """Kill a run when half is done, run again, and say what was lost and what was repeated."""
    library, out = make(folder / "library", range(count)), folder / "out"
    command = [ADAPTC, "batch", recipe, f"{library}/**/", "-o", str(out), "--jobs", str(jobs), "--quiet"]
    process = subprocess.Popen(command)
    while sum(line["status"] == "done" for line in lines(out / "manifest.jsonl")) < count // 2:
        if process.poll() is not None:
            sys.exit("the run was over before it could be killed: raise --count")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line["name"] for line in lines(out / "manifest.jsonl") if line["status"] == "done"]
    subprocess.run(command, check=True)
    after = list(lines(out / "manifest.jsonl"))
    finished = [line["name"] for line in after if line["status"] == "done"]
    begun = [line["name"] for line in after if line["status"] == "started"]
    whole = sum(len(adaptc.load(p.parent).deltas) == len(SHAPES) * LAYERS
                for p in out.rglob("adapter_model.safetensors"))
    left = [p for p in out.rglob(".adaptc*")]
    shutil.rmtree(out), shutil.rmtree(library)
    again, twice = len(finished) - len(set(finished)), len(begun) - len(set(begun))
    return (f"killed when {len(before)} of {count} were recorded as done; after the second run {len(set(finished))} "
            f"are done and {whole} outputs load whole, {again} finished adapters were done again, {twice} that were in "
            f"flight ({jobs} workers) were begun twice, {len(left)} temporary files are left")


def show(measured: dict[tuple[str, int], Measured], target: float) -> None:
    print("| engine | workers | adapters | read | seconds | adapters/s | efficiency | peak memory of a worker |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for (name, jobs), m in measured.items():
        read = sum(r.bytes_before for r in m.results) / 1e9
        efficiency = m.rate / jobs / measured[name, 1].rate
        shown = "" if jobs == 1 else f"{efficiency:.2f} ({'met' if efficiency >= target else 'missed'}: {target})"
        peak = max(r.peak_bytes for r in m.results) / 2**20
        print(f"| {name} | {jobs} | {len(m.results)} | {read:.1f} GB | {m.seconds:.1f} | {m.rate:.2f} | {shown} "
              f"| {peak:.0f} MiB |")


def extrapolate(m: Measured, workers: int) -> None:
    nbytes = m.results[0].bytes_before
    rate = m.rate / workers
    print(f"100,000 such adapters: 100,000 x {nbytes / 1e6:.2f} MB = {nbytes / 1e4:.0f} GB to read; at {m.rate:.2f} a "
          f"second with {workers} workers, 100,000 / {m.rate:.2f} = {1e5 / m.rate:.0f} s = {clock(1e5 / m.rate)}. One "
          f"worker does {rate:.2f} a second and so reads {rate * nbytes / 1e6:.0f} MB a second: 64 workers at the same "
          f"efficiency take 100,000 / (64 x {rate:.2f}) = {clock(1e5 / 64 / rate)} and read "
          f"{64 * rate * nbytes / 1e9:.2f} GB a second, which is what the store has to give.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="adapters of local with 2 workers (2000)")
    parser.add_argument("--chunk", type=int, default=100, help="adapters that exist at a time (100)")
    parser.add_argument("--recipe", default="truncate{rank=8}")
    parser.add_argument("--folder", type=Path, help="where they are made (the system's folder for temporary files)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"adaptc {adaptc.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}; recipe {args.recipe}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as temp:
        folder = Path(temp)
        measured = throughput(args.count, args.chunk, args.recipe, folder)
        show(measured, 0.85)
        print("\n| beside the work, an adapter | measured | at most |\n|---|--:|--:|")
        for name, m in overhead(max(args.count // 10, 20), folder).items():
            print(f"| {name}, 1 worker, {len(m.results)} adapters of {m.results[0].bytes_before} bytes "
                  f"| {m.beside * 1e3:.1f} ms | {20 if name == 'local' else 50} ms |")
        print(f"\n{killed(min(max(args.count // 10, 20), args.chunk), 2, args.recipe, folder)}\n")
        extrapolate(measured["local", 2], 2)
    print(f"\n{clock(time.perf_counter() - start)} in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
