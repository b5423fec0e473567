"""Hold many 1-bit adapters of a 7B-shaped model and run any mixture of them in one batch: python serve_many.py

The base is one block of a 7B Llama (q, k, v, o 4096 x 4096; gate, up, down with 11008) in NF4, random; the adapters are
random signs of rank 16, a gain each. Bytes are measured on that block; a model has 32 of them, which is the
extrapolation printed. Selecting a mixture only says which adapter each row takes: no adapter moves, none is copied.
"""

from __future__ import annotations

import argparse
import random
import resource
import time

import torch
from torch import Tensor, nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.kernels.runtime_branch import Low
from adaptc.kernels.runtime_packed import PackedLinear
from adaptc.kernels.weight import pack_weight

SIZES = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
         "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
BLOCKS, TARGET, RANK = 32, 1000, 16


class Block(nn.Module):
    """The seven projections of one block, chained so that every one of them runs."""

    def __init__(self) -> None:
        super().__init__()
        for name, (m, n) in SIZES.items():
            self.add_module(name, PackedLinear(pack_weight(torch.randn(m, n) / n**0.5, "nf4"), None))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) + self.k(x) + self.v(x))
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def one_bit(seed: int) -> Adapter:
    """Return an adapter whose factors are +-1, as a 1-bit code decodes to, each module with a gain."""
    g = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=g, dtype=torch.int8).mul_(2).sub_(1).float()

    deltas = {f"{name}.weight": LowRank(signs(RANK, n), signs(m, RANK), None, 0.2 / n**0.5 / RANK**0.5, (m, n))
              for name, (m, n) in SIZES.items()}
    return Adapter(deltas, {}, Origin("peft"))


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--mixtures", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    model = Block().eval()
    names = [f"user{i}" for i in range(args.adapters)]
    before = resident_bytes()
    for i, name in enumerate(names):
        runtime = adaptc.attach(model, one_bit(i), name)
    each = runtime.nbytes / args.adapters
    floats = sum(2 * RANK * (m + n) for m, n in SIZES.values())
    grown = (resident_bytes() - before) / 1e6
    print(f"{args.adapters} adapters of one block: {runtime.nbytes / 1e6:.2f} MB held, {each / 1e3:.1f} kB each, "
          f"{floats / each:.1f} times less than bfloat16; the process grew by {grown:.1f} MB")
    print(f"extrapolated to {BLOCKS} blocks and {TARGET} adapters: {each * BLOCKS * TARGET / 1e9:.2f} GB, "
          f"in bfloat16 {floats * BLOCKS * TARGET / 1e9:.1f} GB")

    def addresses() -> list[int]:
        return [t.data_ptr() for layer in runtime.layers.values() for bs in layer.branches.values() for b in bs
                if isinstance(b, Low) for part in b.parts for t in (part.q, part.p, part.core)]

    where, x = addresses(), torch.randn(args.rows, 4096)
    switch, worst, used = [], 0.0, set()
    with torch.inference_mode():
        for _ in range(args.mixtures):
            mixture = [random.choice([*names, None]) for _ in range(args.rows)]
            used.update(mixture)
            start = time.perf_counter()
            adaptc.set_active(model, each=mixture)
            switch.append(time.perf_counter() - start)
            y = model(x)
            row = random.randrange(args.rows)
            adaptc.set_active(model, mixture[row])
            alone = model(x[row : row + 1])
            worst = max(worst, float((y[row : row + 1] - alone).norm() / alone.norm()))
    print(f"{args.mixtures} random mixtures in batches of {args.rows} rows, {len(used)} adapters used: "
          f"selecting takes {sorted(switch)[len(switch) // 2] * 1e6:.0f} us, "
          f"a row differs from its own run by {worst:.1e}")
    moved = sum(a != b for a, b in zip(where, addresses(), strict=True))
    print(f"adapters that moved or were copied: {moved}; "
          f"the process has grown by {(resident_bytes() - before) / 1e6:.1f} MB since the base alone")


if __name__ == "__main__":
    main()
