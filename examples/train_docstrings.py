#!/usr/bin/env python3
"""Train docstrings-adapter: LoRA of rank 32 on all-MiniLM-L6-v2, from docstrings-train.tsv.

    python examples/train_docstrings.py [--out DIR]

Also trains a head on the untouched encoder, to show what the deltas are worth. Test rows are only ever scored.
"""

import argparse
import json
import pathlib
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load, save
from score_docstrings import ADAPTER, HERE, TOKENS, Row, base_folder, classifier, read_rows, score
from transformers import AutoTokenizer

SEED = 20
RANK = 32
BATCH = 32
EPOCHS = 4
RATE = 1e-3


def batches(rows: list[Row], epochs: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield (tokens, labels): shuffled, but of like length within a batch so that little is padding."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    order = random.Random(SEED)
    for _ in range(epochs):
        order.shuffle(rows)
        pools = [rows[start : start + 16 * BATCH] for start in range(0, len(rows), 16 * BATCH)]
        chunks = [
            pool[start : start + BATCH]
            for pool in (sorted(pool, key=lambda row: len(row[1])) for pool in pools)
            for start in range(0, len(pool), BATCH)
        ]
        order.shuffle(chunks)
        for chunk in chunks:
            labels, texts = zip(*chunk, strict=True)
            tokens = tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
            yield tokens, torch.tensor(labels)


def fit(model: Any, rows: list[Row], epochs: int, rate: float) -> None:
    """Minimise cross entropy over all trainable parameters: AdamW, a tenth of warm-up, then linear decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(rows) // BATCH)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    total, started = 0.0, time.monotonic()
    for step, (tokens, labels) in enumerate(batches(list(rows), epochs), 1):
        loss = torch.nn.functional.cross_entropy(model(**tokens).logits, labels)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}/{steps}  loss {total / 50:.3f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
    model.eval()


def head_alone(rows: list[Row], labels: int) -> Any:
    """Return the untouched encoder with a head fitted on its features by full-batch Adam."""
    torch.manual_seed(SEED)
    model = classifier(labels).eval()
    with torch.no_grad():
        seen = [(model.base_model(**tokens).pooler_output, gold) for tokens, gold in batches(list(rows), 1)]
    features, gold = torch.cat([pooled for pooled, _ in seen]), torch.cat([label for _, label in seen])
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(model.classifier(features), gold))
        optimizer.step()
    return model


def adapted(rows: list[Row], labels: int) -> Any:
    """Return the encoder with trained deltas and head."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.05,
        target_modules=["query", "key", "value", "dense"],
    )
    model = get_peft_model(classifier(labels), config)
    fit(model, rows, epochs=EPOCHS, rate=RATE)
    return model


def write(model: Any, folder: pathlib.Path) -> None:
    """Write a PEFT folder with float16 tensors and a config that names the base by its Hub id."""
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: value.half().contiguous() for key, value in load(weights.read_bytes()).items()}
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf8"))
    config["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    config["target_modules"] = sorted(config["target_modules"])
    config["modules_to_save"] = ["classifier"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")
    (folder / "README.md").unlink(missing_ok=True)  # the model card template


def main() -> None:
    """Train both, print their accuracy, write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ADAPTER)
    folder = parser.parse_args().out
    started = time.monotonic()
    train, test = read_rows(HERE / "docstrings-train.tsv"), read_rows(HERE / "docstrings.tsv")
    labels = 1 + max(label for label, _ in train)
    print("head alone:", score(head_alone(train, labels), test), flush=True)
    model = adapted(train, labels)
    print("adapter:", score(model, test), flush=True)
    write(model, folder)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
