"""Straight-through training: values are codes, gradients flow, the result saves as plain PEFT and packs exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import UsageError
from adaptc.lowrank import plain
from adaptc.quant.bilora import BiLora, StraightThrough, bake, codebook, quantize_aware
from adaptc.quant.quantize import Quantize

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["one", "two"]))
    return made


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_are_those_of_the_codec(bits: int) -> None:
    w = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(StraightThrough(bits)(w), BiLora.encode(w, width=bits).decode(), atol=1e-6)


def test_training_moves_the_loss_and_packs_exactly(tmp_path: Path) -> None:
    model = adapted()
    assert quantize_aware(model, bits=1) == 4
    x, y = torch.randn(256, 24), torch.randint(0, 3, (256,))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    bake(model)
    model.save_pretrained(str(tmp_path / "qat"))  # type: ignore[operator]
    a = adaptc.load(tmp_path / "qat")
    for delta in a.deltas.values():
        assert len(delta.a.unique()) == 2  # type: ignore[union-attr]
    boxed = Quantize(method="bilora", bits=1)(a).adapter
    for key, delta in a.deltas.items():
        back = plain(boxed.deltas[key])
        torch.testing.assert_close(back.a, delta.a, rtol=0, atol=1e-6)  # type: ignore[union-attr]
        torch.testing.assert_close(back.b, delta.b, rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_gradient_passes_the_rounding() -> None:
    w = torch.randn(3, 40, requires_grad=True)
    (StraightThrough(1)(w) * torch.randn(3, 40)).sum().backward()
    assert w.grad is not None
    assert bool((w.grad != 0).all())


def test_codes_of_decoded_values_are_found_again() -> None:
    book = codebook(2)
    w = book[torch.randint(0, 4, (5, 64))] * 0.03 - 0.2
    assert torch.allclose(BiLora.encode(w, width=2).decode(), w, atol=1e-7)


def test_a_model_without_factors_is_refused() -> None:
    with pytest.raises(UsageError, match="no lora_A"):
        quantize_aware(Net())
    with pytest.raises(UsageError, match="1, 2, 4 or 8"):
        quantize_aware(adapted(), bits=3)
