"""LoRA folders for the small random models, and data that goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adaptc.tensorfile import write_tensors

LAYERS = {"bert": ("bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.attention.self.value"),
          "llama": ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj")}
OUTPUTS = {"bert": (16, 16), "llama": (16, 8)}


def write_lora(folder: Path, family: str, *, rank: int = 8, size: float = 1.0, seed: int = 0, classes: int = 0) -> Path:
    """Write a PEFT folder of rank 8 on two projections of two layers, with a classifier of `classes` classes if any."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for layer in range(2):
        for name, out in zip(LAYERS[family], OUTPUTS[family], strict=True):
            stem = f"base_model.model.{name.format(layer)}"
            steep = 0.6 ** torch.arange(rank)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 16, generator=random) * steep[:, None]
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=random) * size
    if classes:
        tensors["base_model.model.classifier.weight"] = torch.randn(classes, 16, generator=random)
        tensors["base_model.model.classifier.bias"] = torch.randn(classes, generator=random)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "tiny/base",
              "task_type": "SEQ_CLS" if classes else "CAUSAL_LM",
              "modules_to_save": ["classifier"] if classes else None,
              "target_modules": [n.rpartition(".")[2] for n in LAYERS[family]]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return folder


def words(count: int, seed: int) -> str:
    """Return a line of `count` words that the small tokenizers know."""
    random = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(50, (count,), generator=random).tolist())
