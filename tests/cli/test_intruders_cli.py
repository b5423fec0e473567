"""inspect --intruders: counts on the command line, before and after a pass, spectra kept where asked."""

from __future__ import annotations

import json

import pytest
import torch

from adaptc.tensorfile import write_tensors

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def planted(make):
    """An adapter whose first module has a direction that none of the base's singular vectors resembles."""
    random = torch.Generator().manual_seed(3)
    shapes = {f"model.layers.{i}.self_attn.{n}.weight": (m, 32) for i in range(2) for n, m in (("q_proj", 24),
                                                                                              ("v_proj", 16))}
    base = {k: torch.randn(*s, generator=random) for k, s in shapes.items()}
    base[f"{Q0}.weight"] = torch.eye(24, 32) * torch.linspace(2, 1, 24)[:, None]

    def edit(tensors, config):
        for name in tensors:
            tensors[name] *= 1e-3
        stem = f"base_model.model.{Q0}"
        tensors[f"{stem}.lora_A.weight"][0] = torch.eye(32)[31]
        tensors[f"{stem}.lora_B.weight"][:, 0] = 4.0

    make("adapter", edit=edit)
    with open("base.safetensors", "wb") as f:
        write_tensors(f, base, {})
    return "adapter"


def test_intruders_before_and_after(adaptc, planted):
    args = ("inspect", planted, "--base", "base.safetensors", "--intruders", "--cache", "kept")
    said = adaptc(*args, "--after", "shrink{factor=0.0}", "--json")
    assert said.code == 0, said.err
    data = json.loads(said.out)
    before, after = ({m["name"]: m for m in some} for some in (data["before"], data["after"]["modules"]))
    assert {k: m["intruders"] for k, m in before.items() if m["intruders"]} == {f"{Q0}.weight": 1}
    assert before[f"{Q0}.weight"]["cosines"][0] == pytest.approx(24**-0.5, abs=0.01)
    assert after[f"{Q0}.weight"]["intruders"] == 0
    assert data["after"]["error"] > 0.9
    assert (data["spectra"]["computed"], data["spectra"]["read"]) == (4, 4)
    text = adaptc(*args).out
    assert "4 read again" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("self_attn.q_proj"))
    assert row[:3] == ["self_attn.q_proj", "2", "1"]


def test_intruders_need_a_base_and_known_passes(adaptc, planted):
    said = adaptc("inspect", planted, "--intruders")
    assert (said.code, said.err.splitlines()[0]) == (2, "adaptc: intruders are dimensions of the base weights too")
    said = adaptc("inspect", planted, "--intruders", "--base", "base.safetensors", "--cache", "k", "--after", "shrunk")
    assert said.code == 2
    assert "shrunk is not known" in said.err
