"""Error of dW against stored bits, module by module: python benchmarks/quant_error.py SHARED [--plot OUT.png]

Trained LoRA pairs of SHARED/corpus and SHARED/arena, up to six modules an adapter, each coded alone with its own
budget; index and payload are both counted. Beside it, at the same bytes: optimal truncation + NF4 (double
quantization); and plain sign * mean. Adapters of rank 1 to 4 are listed apart. peft-reg-* and ortgenai-* (not trained)
and petlvit-* (1-bit already) are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch

import adaptc
from adaptc.delta import LowRank
from adaptc.errors import AdaptcError
from adaptc.factor import decoded
from adaptc.quant.baseline import sign_mean, truncation_nf4
from adaptc.quant.rd import Budget, Module, decode, encode

RATES = (0.5, 1.02, 1.5, 2.05, 3.1, 4.1)
GOALS = {1.02: 0.32, 2.05: 0.22, 3.1: 0.14, 4.1: 0.08}


def modules(folder: Path) -> list[Module]:
    """Return up to six low-rank modules of an adapter, evenly spaced; none where it is of another kind."""
    try:
        adapter = adaptc.load(folder)
    except AdaptcError as reason:
        print(f"{folder.name}: {reason}", file=sys.stderr)
        return []
    found = []
    for delta in adapter.deltas.values():
        if isinstance(delta, LowRank) and delta.core is None and len(delta.b.shape) == 2:
            b, a = (decoded(f).float().numpy() for f in (delta.b, delta.a))
            if a.any() and b.any():
                found.append(Module(b, a, delta.scale))
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(6, len(found))).round().astype(int))]


def error(module: Module, b: np.ndarray, a: np.ndarray) -> float:
    old_b, old_a = module.b.astype(np.float64) * module.scale, module.a.astype(np.float64)
    b, a = b.astype(np.float64), a.astype(np.float64)
    total = ((old_b.T @ old_b) * (old_a @ old_a.T)).sum()
    left = total - 2 * ((old_b.T @ b) * (old_a @ a.T)).sum() + ((b.T @ b) * (a @ a.T)).sum()
    return float(np.sqrt(max(left, 0.0) / total))


def measure(module: Module, bits: float) -> tuple[float, float, float]:
    """Return bits a parameter and error of ours, and the error of truncation + NF4 at the same bytes."""
    code = encode({"m": module}, Budget(bits_per_param=bits))
    factors = {"m": (torch.from_numpy(module.b), torch.from_numpy(module.a), module.scale)}
    trivial = truncation_nf4(factors, code.nbytes).error
    return 8 * code.nbytes / (module.b.size + module.a.size), error(module, *decode(code)["m"]), trivial


def table(title: str, chosen: dict[str, list[Module]], goals: dict[float, float]) -> list[tuple[float, float, float]]:
    print(f"\n{title}: {sum(map(len, chosen.values()))} modules of {len(chosen)} adapters")
    print("| bits asked | bits stored | error | goal | truncation + NF4 | " + " | ".join(chosen) + " |")
    print("|" + "---|" * (5 + len(chosen)))
    curve = []
    for bits in RATES:
        rows = {name: [measure(m, bits) for m in mine] for name, mine in chosen.items()}
        flat = [row for mine in rows.values() for row in mine]
        stored, ours, trivial = (mean(column) for column in zip(*flat, strict=True))
        curve.append((stored, ours, trivial))
        each = " | ".join(f"{mean(row[1] for row in mine):.3f}" for mine in rows.values())
        print(f"| {bits} | {stored:.3f} | {ours:.4f} | {goals.get(bits, '')} | {trivial:.4f} | {each} |", flush=True)
    naive = mean(sign_mean({"m": (torch.from_numpy(m.b), torch.from_numpy(m.a), m.scale)}).error
                 for mine in chosen.values() for m in mine)
    print(f"sign * mean, 1 bit and two floats: {naive:.4f}")
    return curve


def plot(curves: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for (title, curve), line in zip(curves.items(), ("-", ":"), strict=False):
        bits, ours, trivial = zip(*curve, strict=True)
        axes.semilogy(bits, ours, "o" + line, color="C0", label=f"adaptc, {title}")
        axes.semilogy(bits, trivial, "s" + line, color="C1", label=f"truncation + NF4, {title}")
    axes.set(xlabel="stored bits a source parameter", ylabel="relative error of dW")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(p for p in (args.shared / "corpus").iterdir() if p.is_dir()) + \
        sorted(args.shared.glob("arena/*/adapter"))
    high: dict[str, list[Module]] = {}
    low: dict[str, list[Module]] = {}
    for folder in folders:
        if folder.name.startswith(("peft-reg-", "petlvit-", "ortgenai-")):
            continue
        name = folder.parent.name if folder.name == "adapter" else folder.name
        for m in modules(folder):
            (high if m.a.shape[0] >= 8 else low).setdefault(name, []).append(m)
    curves = {"rank 8 and more": table("rank 8 and more", high, GOALS), "rank 1 to 4": table("rank 1 to 4", low, {})}
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
