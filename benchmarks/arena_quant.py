"""What quantized adapters are worth: python benchmarks/arena_quant.py SHARED [TASK ...] [--calibrate 40]

Whole container files at 1/64, 1/128 and 1/256 of the float32 bytes of SHARED/arena's adapters (deltas only: the
classifier head is not compressed and not counted), made by `adaptc quantize --size`, decoded by `adaptc decode` and
scored by the arena's own scripts. Beside them, by payload alone: truncation + NF4 and sign * mean, in error of dW. With
--calibrate the language model's gains are refitted on calibration.txt (adaptc.quant.refit: outputs of the full adapter,
no labels). Nothing is chosen by the scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file  # noqa: TID251 - throw-away copies

import adaptc
from adaptc.delta import LowRank
from adaptc.factor import decoded
from adaptc.quant.baseline import sign_mean, truncation_nf4
from adaptc.quant.rd import Budget, Module, RDCode, decode, encode
from adaptc.quant.refit import refit_gains

PARTS = (64, 128, 256)
HEADER = 2600  # bytes a calibrated container is assumed to need beside the code, 210 modules
BASE, FULL = 37.470, 24.566


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    found = {}
    for key, delta in adaptc.load(folder).deltas.items():
        assert isinstance(delta, LowRank)
        found[key] = (decoded(delta.b).float(), decoded(delta.a).float(), delta.scale)
    return found


def without_head(source: Path, target: Path) -> Path:
    """Copy a PEFT folder without its classifier, which the scoring script takes from the original anyway."""
    target.mkdir()
    save_file({k: t for k, t in tensors(source).items() if "lora_" in k}, target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def add_head(plain: Path, source: Path) -> None:
    """Put the classifier back, without which PEFT does not load a classification adapter."""
    head = {k: t for k, t in tensors(source).items() if "lora_" not in k}
    save_file(tensors(plain) | head, plain / "adapter_model.safetensors")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def adaptc_command(*args: object) -> None:
    subprocess.run([str(Path(sys.executable).parent / "adaptc"), *map(str, args)], check=True, capture_output=True)


def classify(arena: Path, task: str, work: Path) -> None:
    made = factors(arena / task / "adapter")
    full = 4 * sum(b.numel() + a.numel() for b, a, _ in made.values())
    scorer = script(arena / "score.py")
    best = scorer.score(arena / task, arena / task / "adapter")["accuracy"]
    print(f"| {task}, float32 | {full} | | | {best:.3f} | |")
    source = without_head(arena / task / "adapter", work / task)
    for part in PARTS:
        file, plain = work / f"{task}-{part}.adaptc.safetensors", work / f"{task}-{part}"
        adaptc_command("quantize", source, "-o", file, "--size", full // part)
        adaptc_command("decode", file, "--to", "peft", "-o", plain)
        after = factors(plain)
        add_head(plain, arena / task / "adapter")
        row = f"| {task}, 1/{part} | {file.stat().st_size} | {total_error(made, after):.3f} | "
        row += f"{truncation_nf4(made, full // part).error:.3f} | "
        print(row + f"{scorer.score(arena / task, plain)['accuracy']:.3f} | |", flush=True)
    print(f"| {task}, sign * mean | {sign_mean(made).nbytes} | {sign_mean(made).error:.3f} | | | |")


def total_error(before: dict[str, Any], after: dict[str, Any]) -> float:
    left = total = 0.0
    for key, (b, a, s) in before.items():
        b, a = s * b.double(), a.double()
        b2, a2, s2 = after.get(key, (torch.zeros(len(b), 0), torch.zeros(0, a.shape[1]), 1.0))
        b2, a2 = s2 * b2.double(), a2.double()
        energy = float(((b.mT @ b) * (a @ a.mT)).sum())
        left += energy - 2 * float(((b.mT @ b2) * (a @ a2.mT)).sum()) + float(((b2.mT @ b2) * (a2 @ a2.mT)).sum())
        total += energy
    return math.sqrt(max(left, 0.0) / total)


def language(arena: Path, work: Path, windows: int) -> None:
    task = arena / "smollm2-shakespeare"
    made = factors(task / "adapter")
    full = 4 * sum(b.numel() + a.numel() for b, a, _ in made.values())
    scorer = script(arena / "perplexity.py")
    model, tokens = scorer.load()
    for part in PARTS[1:]:
        file, plain = work / f"lm-{part}.adaptc.safetensors", work / f"lm-{part}"
        adaptc_command("quantize", task / "adapter", "-o", file, "--size", full // part)
        adaptc_command("decode", file, "--to", "peft", "-o", plain)
        after = factors(plain)
        row = f"| lm, 1/{part} | {file.stat().st_size} | {total_error(made, after):.3f} | "
        row += f"{truncation_nf4(made, full // part).error:.3f} | | "
        print(row + f"{kept(scorer, model, tokens, after)} |", flush=True)
        if windows:
            modules = {k: Module(b.numpy(), a.numpy(), s) for k, (b, a, s) in made.items()}
            code = encode(modules, Budget(nbytes=full // part - HEADER))
            code = refit(model, tokens, task, made, code, windows)
            after = {k: (torch.tensor(b), torch.tensor(a), 1.0) for k, (b, a) in decode(code).items()}
            print(f"| lm, 1/{part}, gains refitted | {code.nbytes + HEADER} | {total_error(made, after):.3f} | | | "
                  f"{kept(scorer, model, tokens, after)} |", flush=True)


def refit(model: Any, tokens: Any, task: Path, made: dict[str, Any], code: RDCode, windows: int) -> RDCode:
    length = 256
    ids = torch.tensor(tokens((task / "calibration.txt").read_text())["input_ids"])
    batches = [window[None] for window in ids[: len(ids) // length * length].split(length)][:windows]
    layers = {key: model.get_submodule(key.removesuffix(".weight")) for key in made}
    reference = {key: (s * b, a) for key, (b, a, s) in made.items()}
    model.requires_grad_(False)
    return refit_gains(lambda x: model(x).logits, layers, reference, code, batches, epochs=1)


def kept(scorer: ModuleType, model: Any, tokens: Any, after: dict[str, Any]) -> str:
    """Return perplexity of the base model plus `after`, and the share of the adapter's improvement that is left."""
    handles = []
    for key, (b, a, s) in after.items():
        add = lambda layer, args, out, b=b, a=a, s=s: out + s * (args[0] @ a.T) @ b.T
        handles.append(model.get_submodule(key.removesuffix(".weight")).register_forward_hook(add))
    found = scorer.perplexity(model, tokens)
    for handle in handles:
        handle.remove()
    return f"{found:.3f} ({(BASE - found) / (BASE - FULL):.1%} kept)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("tasks", nargs="*", default=["sst2", "trec", "smollm2-shakespeare"])
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help="refit gains on N windows of 256 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| adapter | bytes of the file | error of dW | truncation + NF4 | accuracy | perplexity |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for task in args.tasks:
            if task.startswith("smollm2"):
                language(args.shared / "arena", Path(folder), args.calibrate)
            else:
                classify(args.shared / "arena", task, Path(folder))


if __name__ == "__main__":
    main()
