"""A small network with every kind of layer PEFT's LoRA knows, and what PEFT makes of an adapter on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

CONV1D = ("c1d.weight", "blocks.0.c1d.weight", "blocks.1.c1d.weight")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...i,eoi->...eo", x, self.gate_up_proj)
        return torch.einsum("...eo,eio->...i", h, self.down_proj)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 14)
        self.c1d = Conv1D(8, 10)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 10)
        self.lin = nn.Linear(10, 12)
        self.lin2 = nn.Linear(12, 10, bias=False)
        self.c1d = Conv1D(12, 10)
        self.conv = nn.Conv2d(4, 6, 3)
        self.conv1 = nn.Conv1d(4, 6, 5)
        self.mha = nn.MultiheadAttention(8, 2)
        self.experts = Experts()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin2(self.lin(self.emb(x))))


def base() -> Toy:
    torch.manual_seed(7)
    return Toy().eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def trained(folder: Path, kind: str = "Lora", **config: Any) -> Path:
    """Save a PEFT adapter of the toy with random values in every trained tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(), getattr(peft, f"{kind}Config")(**config))
        generator = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if p.requires_grad or "lora_" in name:
                with torch.no_grad():
                    p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        model.save_pretrained(folder)
    return folder


def reloaded(folder: Path) -> dict[str, Tensor]:
    """Return the toy's parameters after PEFT loaded `folder` and merged it; a key that PEFT ignores or misses fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(folder)
        model = peft.get_peft_model(base(), config)
        given = peft.utils.load_peft_weights(folder, device="cpu")
        assert set(given) >= set(peft.get_peft_model_state_dict(model))
        result = peft.set_peft_model_state_dict(model, given)
        assert not result.unexpected_keys, result.unexpected_keys
        return weights(model.merge_and_unload())
