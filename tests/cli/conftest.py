"""A small PEFT adapter on disk, and the command line called in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adaptc.cli.main import main
from adaptc.tensorfile import write_tensors


@dataclass
class Said:
    """What one call left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self):
        return json.loads(self.out)


def write_adapter(folder: Path, *, layers: int = 2, rank: int = 8, alpha: int = 16, seed: int = 0, edit=None) -> Path:
    """Write a PEFT folder: q_proj and v_proj of `layers` layers, steep spectra, and one carried head."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, out in (("q_proj", 24), ("v_proj", 16)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            steep = 0.5 ** torch.arange(rank)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 32, generator=random) * steep[:, None]
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=random) * steep
    tensors["base_model.model.score.weight"] = torch.randn(3, 32, generator=random)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "tiny/base",
              "modules_to_save": ["score"]}
    if edit:
        edit(tensors, config)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return folder


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make("name", layers=..., edit=...): a PEFT folder in the current, empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda name, **kw: write_adapter(Path(name), **kw)


@pytest.fixture
def adapter(make: Callable[..., Path]) -> Path:
    return make("adapter")


@pytest.fixture
def adaptc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """The command line, called in this process."""
    monkeypatch.delenv("ADAPTC_DEBUG", raising=False)

    def call(*args: object) -> Said:
        capsys.readouterr()
        code = main([str(a) for a in args])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call
