"""Speed of rate-distortion coding on a 7B-shaped adapter: python benchmarks/quant_speed.py [--rank 16] [--bits 1]

224 modules (32 layers of q, k, v, o 4096 x 4096; gate, up 11008 x 4096; down 4096 x 11008) with random factors whose
singular values fall as k^-0.7. Encoding runs on one core. Decoding is timed as the best of seven, after one to warm up,
in NumPy alone and in native code (ADAPTC_KERNELS naive and native, turn by turn; all processors), which must agree;
"produced" counts the float32 factors that come out (the kept directions), "adapter" the float32 adapter they stand for.
Both wall and processor time are printed: they differ where the machine is busy with something else.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from adaptc.quant.rd import Budget, Module, decode, encode

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def adapter(rank: int, layers: int) -> dict[str, Module]:
    rng = np.random.default_rng(0)
    fall = np.arange(1, rank + 1, dtype=np.float32) ** np.float32(-0.7)
    return {
        f"{layer}.{i}": Module(
            rng.standard_normal((m, rank), dtype=np.float32) * fall, rng.standard_normal((rank, n), dtype=np.float32)
        )
        for layer in range(layers)
        for i, (m, n) in enumerate(SHAPES)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    modules = adapter(args.rank, args.layers)
    params = sum(m.b.size + m.a.size for m in modules.values())
    wall, cpu = time.perf_counter(), time.process_time()
    code = encode(modules, Budget(bits_per_param=args.bits))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{len(modules)} modules of rank {args.rank}, {4 * params / 1e6:.0f} MB in float32, coded in {code.nbytes:,} "
          f"bytes ({8 * code.nbytes / params:.3f} bits a parameter, index {len(code.index):,} bytes)")
    print(f"encode: {wall:.1f} s wall, {cpu:.1f} s of one core")
    best = dict.fromkeys(("naive", "native"), (np.inf, np.inf))
    for turn in range(8):
        factors = []
        for wish in best:
            os.environ["ADAPTC_KERNELS"] = wish
            wall, cpu = time.perf_counter(), time.process_time()
            factors.append(decode(code))
            took = time.perf_counter() - wall, time.process_time() - cpu
            best[wish] = min(best[wish], took) if turn else best[wish]
        for name, pair in factors[0].items():
            for ours, theirs in zip(pair, factors[1][name], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    produced = sum(b.nbytes + a.nbytes for b, a in factors[0].values())
    for wish, (wall, cpu) in best.items():
        for name, nbytes in (("produced", produced), ("adapter", 4 * params)):
            print(f"decode, {wish}, {name} {nbytes / 1e6:.0f} MB: {nbytes / 1e6 / wall:.0f} MB/s wall, "
                  f"{nbytes / 1e6 / cpu:.0f} MB/s of processor time")
    print(f"load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
