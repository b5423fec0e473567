"""Make the files of the browser example: python examples/web/prepare.py [BASE ADAPTER ADAPTER ...] [--text LINE ...]

Writes site/: the page, ONNX Runtime's wasm build out of node_modules, the base as ONNX with required slots, one
expander graph for each adapter, and expected.json: inputs, and what the same files give in Python. Without arguments a
small random BERT classifier and two random adapters at 1 bit are made, which needs no model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from click.testing import CliRunner

import adaptc
from adaptc.cli.main import cli
from adaptc.formats.onnx.values import fp32_nbytes

HERE = Path(__file__).parent
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def adaptc_command(*args: object) -> None:
    result = CliRunner().invoke(cli, [str(a) for a in args])
    if result.exit_code:
        raise SystemExit(f"adaptc {' '.join(map(str, args))}: {result.output or result.exception}")


def random_models(work: Path) -> tuple[Path, list[Path]]:
    """Make a two-layer BERT classifier and two adapters of rank 8 for it."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=64, num_labels=3)
    base = work / "base"
    BertForSequenceClassification(config).save_pretrained(base)
    adapters = []
    for name in ("forward", "backward"):
        model = get_peft_model(BertForSequenceClassification.from_pretrained(base, num_labels=3), LoraConfig(
            r=8, lora_alpha=32, target_modules=["query", "value", "dense"], task_type=TaskType.FEATURE_EXTRACTION))
        for key, p in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.1)
        model.save_pretrained(work / name)
        adaptc_command("quantize", work / name, "--bits", 1, "-o", work / f"{name}.adaptc.safetensors")
        adapters.append(work / f"{name}.adaptc.safetensors")
    return base, adapters


def inputs(base: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Return the model's integer inputs for each text, or for three random rows where there are none."""
    if texts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        return [{"text": t, "feeds": {k: list(v) for k, v in tokenizer(t).items()}} for t in texts]
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 200, n).tolist() for n in (5, 12, 20)]
    return [{"text": f"tokens {' '.join(map(str, r[:6]))} ...",
             "feeds": {"input_ids": r, "attention_mask": [1] * len(r), "token_type_ids": [0] * len(r)}} for r in rows]


def expand(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    session = ort.InferenceSession(path)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {}), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="BASE ADAPTER ...")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "site")
    options = parser.parse_args()
    site: Path = options.out
    if site.exists():
        shutil.rmtree(site)
    (site / "ort").mkdir(parents=True)
    for name in ("index.html", "app.mjs"):
        shutil.copy(HERE / name, site)
    for name in RUNTIME:
        shutil.copy(HERE / "node_modules/onnxruntime-web/dist" / name, site / "ort")
    with tempfile.TemporaryDirectory() as temp:
        work = Path(temp)
        base, adapters = (Path(options.models[0]), list(map(Path, options.models[1:]))) if options.models else \
            random_models(work)
        names = [a.name.split(".")[0] for a in adapters]
        model: Path | None = None
        for name, adapter in zip(names, adapters, strict=True):
            target = ["--slots", "required", "--expander"] if model is None else ["--expander"]
            adaptc_command("export", adapter, "--onnx", "--base", model or base, *target, "--target", "ort-web",
                           "-o", work / "made" / name)
            if model is None:
                model = next(p for p in (work / "made" / name).glob("*.onnx") if p.name != "expander.onnx")
                shutil.copy(model, site / "base.onnx")
            shutil.copy(work / "made" / name / "expander.onnx", site / f"{name}.onnx")
        rows = inputs(base, options.text)
        float_nbytes = {n: fp32_nbytes(adaptc.load(a)) for n, a in zip(names, adapters, strict=True)}
    session = ort.InferenceSession(site / "base.onnx")
    known = {i.name for i in session.get_inputs()}
    slots = {n: expand(site / f"{n}.onnx") for n in names}
    for row in rows:
        row["feeds"] = {k: v for k, v in row["feeds"].items() if k in known}
        feeds = {k: np.array([v], dtype=np.int64) for k, v in row["feeds"].items()}
        row["expected"] = {n: session.run(None, {**feeds, **held})[0].reshape(-1).tolist()
                           for n, held in (("none", rank_zero(session, slots[names[0]])), *slots.items())}
    (site / "expected.json").write_text(json.dumps({
        "adapters": [{"name": n, "file": f"{n}.onnx", "float32": float_nbytes[n]} for n in names], "rows": rows}))
    print(f"{site}: base {(site / 'base.onnx').stat().st_size:,} B, adapters "
          + ", ".join(f"{n} {(site / f'{n}.onnx').stat().st_size:,} B" for n in names))


def rank_zero(session: ort.InferenceSession, slots: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Return what to feed for no adapter: every slot with its dynamic dimension, the rank, at 0."""
    dims = {i.name: i.shape for i in session.get_inputs()}
    return {n: np.zeros([d if isinstance(d, int) else 0 for d in dims[n]], dtype=v.dtype) for n, v in slots.items()}


if __name__ == "__main__":
    main()
