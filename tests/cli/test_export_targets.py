"""adaptc export --gguf and --mlx, and verify --runtime, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptc import load
from adaptc.formats.mlx import Mlx


def config(at: Path, **more: object) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4,
                                                "num_key_value_heads": 4, **more}))
    return at


def test_gguf(adapter: Path, adaptc: Callable[..., object]) -> None:
    config(Path("base"))
    refused = adaptc("export", adapter, "--gguf", "--base", "base")
    assert refused.code == 1
    assert "score.weight: a full tensor" in refused.err
    said = adaptc("export", adapter, "--gguf", "--base", "base", "--allow-loss", "--type", "q8_0", "--json")
    assert said.code == 0, said.err
    assert said.data["output"] == "adapter.q8_0.gguf"
    assert said.data["architecture"] == "llama"
    assert said.data["error"] < 0.01
    assert said.data["losses"] == ["score.weight: a full tensor, which llama.cpp's adapters have not"]
    assert {m["rank"] for m in said.data["modules"]} == {32}
    assert adaptc("inspect", "adapter.q8_0.gguf").code == 0
    assert adaptc("export", adapter, "--gguf", "--base", "base", "--allow-loss", "--type", "q8_0").code == 2
    back = adaptc("diff", adapter, "adapter.q8_0.gguf", "--json")
    assert back.code == 0


def test_gguf_says_what_falls_back(adapter: Path, adaptc: Callable[..., object]) -> None:
    config(Path("base"))
    said = adaptc("export", adapter, "--gguf", "--base", "base", "--allow-loss", "--type-a", "q1_0", "--type-b", "q4_0",
                  "-o", "out.gguf")
    assert said.code == 0, said.err
    assert "4 of 4 modules: A in q4_0, their inputs are no whole blocks of q1_0" in said.out
    assert "wrote out.gguf: llama" in said.out


def test_gguf_asks_for_the_base(adapter: Path, adaptc: Callable[..., object]) -> None:
    said = adaptc("export", adapter, "--gguf", "--allow-loss")
    assert said.code == 1
    assert "architecture of the base model (tiny/base) is not known" in said.err
    assert "--base" in said.err
    assert adaptc("export", adapter, "--gguf", "--base", "nowhere").code == 1
    assert adaptc("export", adapter, "--gguf", "--slots", "optional").code == 2
    assert adaptc("export", adapter, "--gguf", "--mlx").code == 2


def test_gguf_refuses_dora_with_the_way_out(make: Callable[..., Path], adaptc: Callable[..., object]) -> None:
    import torch

    def edit(tensors: dict[str, object], told: dict[str, object]) -> None:
        told["use_dora"] = True
        for key in [k for k in tensors if k.endswith("lora_B.weight")]:
            tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[key].shape[0])

    config(Path("base"))
    said = adaptc("export", make("dora", edit=edit), "--gguf", "--base", "base")
    assert said.code == 1
    assert "resolve,truncate{rank=32}" in said.err


def test_mlx(adapter: Path, adaptc: Callable[..., object]) -> None:
    said = adaptc("export", adapter, "--mlx")
    assert said.code == 0, said.err
    assert "wrote adapter-mlx/: MLX" in said.out
    assert "--adapter-path adapter-mlx" in said.out
    assert isinstance(load("adapter-mlx"), type(load(adapter)))
    assert load("adapter-mlx").origin.dialect == Mlx.id
    assert adaptc("export", adapter, "--mlx", "-o", "one.safetensors").code == 2


def test_genai_wants_its_folder(adapter: Path, adaptc: Callable[..., object]) -> None:
    assert "--ort-genai wants a base" in adaptc("export", adapter, "--ort-genai").err
    assert "no genai_config.json" in adaptc("export", adapter, "--ort-genai", "--base", config(Path("b"))).err


def test_verify_options(adapter: Path, adaptc: Callable[..., object]) -> None:
    assert "needs --base" in adaptc("verify", adapter, "--runtime", "peft").err
    assert "is for --runtime" in adaptc("verify", adapter, "--reference", "x").err
    assert adaptc("verify", "nothing.gguf", "--runtime", "llama-cpp", "--base", "x").code == 2


def test_loralib_says_which_alpha_it_takes(make: Callable[..., Path], adaptc: Callable[..., object]) -> None:
    adapter = make("in", edit=lambda t, c: (t.pop("base_model.model.score.weight"), c.pop("modules_to_save")))
    said = adaptc("convert", adapter, "out.pt", "--to", "loralib")
    assert said.code == 1
    assert "is read with --alpha 16" in said.err
    assert adaptc("convert", adapter, "out.pt", "--to", "loralib", "--allow-loss").code == 0
    again = adaptc("diff", adapter, "out.pt", "--json")
    assert again.code == 1  # no alpha, no scale
    assert adaptc("convert", "out.pt", "back", "--to", "peft", "--alpha", "16").code == 0
    assert adaptc("diff", adapter, "back", "--json").data["error"] < 1e-6


def test_dialects_that_are_only_refused_are_not_offered(adapter: Path, adaptc: Callable[..., object]) -> None:
    assert "refused" not in adaptc("convert", adapter, "x", "--to", "refuse").err
    Path("odd.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    said = adaptc("inspect", "odd.safetensors").err
    assert "known dialects" in said
    assert "refused" not in said


@pytest.mark.parametrize("name", ["gguf", "mlx", "ort-genai", "onnx"])
def test_help_names_every_target(name: str, adaptc: Callable[..., object]) -> None:
    assert f"--{name}" in adaptc("export", "--help").out
