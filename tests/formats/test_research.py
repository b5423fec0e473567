"""Cores and gates of research code, against the forward of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from files import noise, put, put_config

import adaptc
from adaptc.errors import FormatError, NeedsError, UnsupportedError

A, B = noise(3, 10), noise(7, 3, seed=1)
X = noise(4, 10, seed=2).double()


def added(adapter: adaptc.Adapter, key: str) -> torch.Tensor:
    return X @ adapter.deltas[key].dense().T


def test_sora(tmp_path: Path) -> None:
    gate = torch.tensor([[2.0, 0.0, -1.0]])
    tensors = {"e.query.lora.lora_A": A, "e.query.lora.lora_B": B, "e.query.lora.gate": gate,
               "classifier.weight": noise(2, 7)}
    path = put(tmp_path / "x.safetensors", tensors)
    with pytest.raises(NeedsError, match="scale"):
        adaptc.load(path)
    adapter = adaptc.load(path, alpha=6)
    want = ((X @ A.double().T) * gate.double()) @ B.double().T * 2
    torch.testing.assert_close(added(adapter, "e.query.weight"), want)
    assert set(adapter.replaced) == {"classifier.weight"}
    again = adaptc.load(adaptc.save(adapter, tmp_path / "peft"))
    torch.testing.assert_close(again.deltas["e.query.weight"].dense(), adapter.deltas["e.query.weight"].dense(),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [None, 2])
def test_adalora_of_its_authors(kept: int | None, tmp_path: Path) -> None:
    e = noise(3, 1, seed=5)
    counted = {} if kept is None else {"q.ranknum": torch.tensor(float(kept))}
    tensors = {"q.lora_A": A, "q.lora_B": B, "q.lora_E": e, **counted}
    adapter = adaptc.load(put(tmp_path / "x.pt", tensors), alpha=16)
    want = X @ (A.double() * e.double()).T @ B.double().T * (16 / ((kept or 3) + 1e-5))
    torch.testing.assert_close(added(adapter, "q.weight"), want)


def test_lora_xs(tmp_path: Path) -> None:
    core = noise(3, 3, seed=4)
    stem = "base_model.model.e.query"
    tensors = {f"{stem}.lora_A.default.weight": A, f"{stem}.lora_B.default.weight": B,
               f"{stem}.default_lora_latent_mapping.weight": core, "base_model.model.classifier.weight": noise(2, 7)}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    at = put(put_config(tmp_path / "in", config) / "adapter_model.safetensors", tensors).parent
    adapter = adaptc.load(at)
    torch.testing.assert_close(added(adapter, "e.query.weight"), X @ A.double().T @ core.double().T @ B.double().T * 2)
    assert set(adapter.replaced) == {"classifier.weight"}  # the core is no replaced module
    again = adaptc.load(adaptc.save(adapter, tmp_path / "peft"))
    torch.testing.assert_close(again.deltas["e.query.weight"].dense(), adapter.deltas["e.query.weight"].dense(),
                               rtol=1e-6, atol=1e-6)


def test_cores_without_their_factors(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.default_lora_latent_mapping.weight": noise(3, 3)}
    with pytest.raises(NeedsError, match="without their frozen A and B"):
        adaptc.load(put(put_config(tmp_path, {"peft_type": "LORA", "r": 3}) / "adapter_model.safetensors", tensors))


def test_gates_that_do_not_fit(tmp_path: Path) -> None:
    tensors = {"q.lora.lora_A": A, "q.lora.lora_B": B, "q.lora.gate": noise(1, 2)}
    with pytest.raises(FormatError, match="do not fit"):
        adaptc.load(put(tmp_path / "x.safetensors", tensors), alpha=1)


@pytest.mark.parametrize(("key", "says"), [
    ("model.d.adapter_layer.lora_kqv_adapter.linear_in.weight", "NeMo"), ("l.moe_gate.weight", "MeteoRA"),
    ("q.vector_z", "LoLDU"), ("q.In_Qs", "SNELL"), ("internal_xlora_classifier.inner.0.weight", "X-LoRA")])
def test_refused_by_name(key: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=says):
        adaptc.load(put(tmp_path / "x.safetensors", {key: noise(3, 3)}))


def test_damaged_gguf_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FormatError, match="GGUF"):
        adaptc.load(tmp_path / "a.gguf")
