"""Recognition: the right dialect, by the strongest evidence, and never two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from files import noise, put, put_config

from adaptc.errors import AdaptcError, UnsupportedError
from adaptc.formats.sniff import recognise
from adaptc.formats.source import open_source

A, B = noise(2, 8), noise(6, 2)
FILES = {
    "peft": {"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B},
    "lora-xs": {"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B,
                "base_model.model.x.default_lora_latent_mapping.weight": noise(2, 2)},
    "mlx": {"x.lora_a": A.T, "x.lora_b": B.T},
    "torchtune": {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B},
    "loralib": {"x.lora_A": A, "x.lora_B": B},
    "sora": {"x.lora.lora_A": A, "x.lora.lora_B": B, "x.lora.gate": noise(1, 2)},
    "adalora": {"x.lora_A": A, "x.lora_B": B, "x.lora_E": noise(2, 1)},
    "samvit": {"w_a_000": A, "w_a_001": A, "w_b_000": B, "w_b_001": B},
    "refused": {"d.linear_qkv.adapter.linear_in.weight": A, "d.linear_qkv.adapter.linear_out.weight": B},
    "kohya": {"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B,
              "lora_unet_x.alpha": torch.tensor(2.0)},
    "diffusers": {"unet.x.to_q.lora_A.weight": A, "unet.x.to_q.lora_B.weight": B},
    "cloneofsimo": {"unet:0:down": A, "unet:0:up": B},
}


@pytest.mark.parametrize("dialect", FILES)
def test_by_keys(dialect: str, tmp_path: Path) -> None:
    fmt, evidence = recognise(open_source(put(tmp_path / "x.safetensors", FILES[dialect])))
    assert fmt.id == dialect
    assert evidence.reason


def test_config_beats_keys(tmp_path: Path) -> None:
    put(put_config(tmp_path / "p", {"peft_type": "LORA"}) / "adapter_model.safetensors", FILES["loralib"])
    put(put_config(tmp_path / "m", {"lora_parameters": {}}) / "adapters.safetensors", FILES["mlx"])
    assert recognise(open_source(tmp_path / "p"))[0].id == "peft"
    assert recognise(open_source(tmp_path / "m"))[0].id == "mlx"


def test_cores_beat_the_peft_config_beside_them(tmp_path: Path) -> None:
    """PEFT would take the trained cores for replaced modules and drop them in silence."""
    put(put_config(tmp_path / "p", {"peft_type": "LORA", "r": 2}) / "adapter_model.safetensors", FILES["lora-xs"])
    assert recognise(open_source(tmp_path / "p"))[0].id == "lora-xs"


def test_what_nobody_knows_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    source = open_source(put(tmp_path / "x.safetensors", {"some.weight": A}))
    with pytest.raises(UnsupportedError, match=r"no known adapter dialect \(holds some\.weight\)"):
        recognise(source)


def test_the_caller_may_say(tmp_path: Path) -> None:
    source = open_source(put(tmp_path / "x.safetensors", FILES["peft"]), alpha=1)
    assert recognise(source, "mlx")[0].id == "mlx"
    with pytest.raises(AdaptcError, match="not known"):
        recognise(source, "mxl")
