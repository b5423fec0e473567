"""Adapter files of the diffusion dialects, written by hand, and what is compared about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter
from adaptc.delta import NeedsBase
from adaptc.tensorfile import TensorFile, write_tensors

DOWN = "down_blocks_0_attentions_0_transformer_blocks_0"
PLAIN = f"lora_unet_{DOWN}_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PLAIN_KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CONV_KEY = "unet.down_blocks.0.resnets.0.conv1.weight"


def t(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a small random tensor, another one for another shape or seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape))).to(dtype)


def put(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    with path.open("wb") as f:
        write_tensors(f, tensors, metadata or {})
    return path


def under(stem: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Return tensors under a stem; lora_down and lora_up get their .weight."""
    return {f"{stem}.{k}.weight" if k.startswith("lora_") else f"{stem}.{k}": v for k, v in tensors.items()}


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, **kw: str) -> Adapter:
    """Write a file and load it."""
    return adaptc.load(put(path / "in.safetensors", tensors, metadata), **kw)  # type: ignore[arg-type]


def assert_verbatim(source: Path, out: Path) -> None:
    """Fail unless two safetensors files hold the same metadata, keys and tensors, bit for bit."""
    before, after = TensorFile(source), TensorFile(out)
    assert dict(after.metadata) == dict(before.metadata)
    assert set(after) == set(before)
    for key in before:
        assert (after[key].dtype, after[key].shape) == (before[key].dtype, before[key].shape), key
        assert torch.equal(after[key].view(-1), before[key].view(-1)), key


def round_trip(adapter: Adapter, folder: Path, *dialects: str) -> Adapter:
    """Return the adapter after a file in each dialect."""
    for i, dialect in enumerate(dialects):
        out = folder / (f"{i}-{dialect}" + ("" if dialect == "peft" else ".safetensors"))
        adapter = adaptc.load(adaptc.save(adapter, out, dialect=dialect), dialect=dialect)
    return adapter


def dense(adapter: Adapter, key: str) -> Tensor:
    """Return dW in float64, of the direction where there is a magnitude."""
    delta = adapter.deltas[key]
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    assert inner is not None
    return inner.dense()


def close(x: Tensor, y: Tensor, tolerance: float = 1e-14) -> bool:
    """Return whether ||x - y|| <= tolerance * ||y||, both finite."""
    off = float((x - y).norm()) if x.shape == y.shape else math.inf
    return math.isfinite(off) and off <= tolerance * float(y.norm())
