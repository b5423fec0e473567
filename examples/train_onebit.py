#!/usr/bin/env python3
"""One-bit training in short: the same LoRA trained plainly and as its own one-bit codes, on part of the docstrings.

    python examples/train_onebit.py [--rows 3000] [--out build/onebit]

Prints the accuracy of the plain adapter, of its post-hoc one-bit form (Bi-LoRA's quantizer on trained factors), and of
the adapter trained with `adaptc.quant.bilora.quantize_aware`, whose codes are exact. A few minutes on two cores; not
tuned: it shows the mechanism on a real task, not the best one-bit adapter.
"""

import argparse
import pathlib
import random
import shutil
import time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from score_docstrings import HERE, Row, classifier, read_rows, score
from train_docstrings import SEED, fit

import adaptc
from adaptc.formats.portable import without_container
from adaptc.quant.bilora import bake, quantize_aware

RANK = 16


def lora(labels: int) -> Any:
    torch.manual_seed(SEED)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=RANK, target_modules=["query", "value"])
    return get_peft_model(classifier(labels), config)


def trained(rows: list[Row], labels: int, bits: int | None, folder: pathlib.Path) -> Any:
    model = lora(labels)
    if bits is not None:
        print(f"{quantize_aware(model, bits)} factors train as {bits}-bit codes", flush=True)
    fit(model, rows, epochs=1, rate=2e-3)
    bake(model)
    model.save_pretrained(folder)
    return model


def boxed(folder: pathlib.Path, labels: int) -> tuple[Any, int]:
    """Return the model with the adapter as one-bit codes, and the container's bytes."""
    coded = adaptc.run(adaptc.load(folder), "quantize{method=bilora,bits=1}")
    box = adaptc.save(coded, folder.with_name(folder.name + "-1bit.adaptc.safetensors"), force=True)
    plain = adaptc.save(without_container(adaptc.load(box)), folder.with_name(folder.name + "-decoded"), force=True)
    return PeftModel.from_pretrained(classifier(labels), plain).eval(), box.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent / "build" / "onebit")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    every, test = read_rows(HERE / "docstrings-train.tsv"), read_rows(HERE / "docstrings.tsv")
    labels, started = 1 + max(label for label, _ in every), time.monotonic()
    rows = random.Random(SEED).sample(every, min(args.rows, len(every)))
    found = {"plain, fp32": score(trained(rows, labels, None, args.out / "plain"), test)}
    found["plain, then one bit"] = score(boxed(args.out / "plain", labels)[0], test)
    trained(rows, labels, 1, args.out / "onebit")
    model, nbytes = boxed(args.out / "onebit", labels)
    found[f"trained at one bit ({nbytes:,} bytes with head)"] = score(model, test)
    for name, figures in found.items():
        print(f"{name:<48} " + "  ".join(f"{k} {v}" for k, v in figures.items()))
    print(f"{len(rows)} rows, {(time.monotonic() - started) / 60:.1f} minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
