"""A library of small adapters on disk, and work that kills its own process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

from adaptc.evidence.fleet_work import Job, Result, process
from adaptc.tensorfile import write_tensors


def write_peft(folder: Path, seed: int = 0, rank: int = 4, layers: int = 1) -> Path:
    """Write a PEFT folder with two modules a layer."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 16, generator=random)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(12, rank, generator=random)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "tiny/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return folder


def write_kohya(path: Path, seed: int = 0) -> Path:
    """Write a kohya file."""
    random = torch.Generator().manual_seed(seed)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, 16, generator=random),
               f"{stem}.lora_up.weight": torch.randn(12, 4, generator=random), f"{stem}.alpha": torch.tensor(4.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        write_tensors(f, tensors, {})
    return path


def write_library(root: Path, count: int = 3) -> Path:
    """Write `count` PEFT folders in two languages, and one kohya file between a readme and an optimizer's state."""
    for i in range(count):
        write_peft(root / ("de" if i % 2 else "en") / f"a{i}", seed=i)
    write_kohya(root / "loose" / "style.safetensors")
    (root / "loose" / "README.md").write_text("# style")
    (root / "loose" / "optimizer.pt").write_bytes(b"x")
    return root


def tree(folder: Path) -> set[str]:
    """Return every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def suicidal(job: Job) -> Result:
    """Process a job; the one called "de/a1" kills its process, as the system does when memory is short."""
    if job.name == "de/a1":
        os.kill(os.getpid(), signal.SIGKILL)
    return process(job)
