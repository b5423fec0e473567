"""adaptc inspect: figures against dense algebra, flags for what is wrong, the plot."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import adaptc as library

Q0 = "model.layers.0.self_attn.q_proj"


def test_figures_match_dense_algebra(adaptc, adapter):
    data = adaptc("inspect", adapter, "--json").data
    assert (data["dialect"], data["base"]) == ("peft", "tiny/base")
    assert list(data["carried"]) == ["score.weight"]
    total, kept = 0.0, dict.fromkeys(data["energy_kept"], 0.0)
    for module, delta in zip(data["modules"], library.load(adapter).deltas.values(), strict=True):
        s = torch.linalg.svdvals(delta.dense())[:8]
        assert module["spectrum"] == pytest.approx(s.tolist(), rel=1e-8)
        p = s.square() / s.square().sum()
        assert module["effective_rank"] == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-8)
        assert (module["rank"], module["scale"], module["alpha"], module["dtype"]) == (8, 2.0, 16.0, "float32")
        assert module["bytes"] == 4 * 8 * (module["shape"][0] + 32)
        assert module["flags"] == []
        total += float(s.square().sum())
        for k in kept:
            kept[k] += float(s[: int(k)].square().sum())
    assert data["energy_kept"] == pytest.approx({k: v / total for k, v in kept.items()})
    assert list(kept) == ["1", "2", "4", "8"]


def test_rank_for_share_is_the_smallest(adapter):
    for module in library.inspect(library.load(adapter)):
        for share in (0.5, 0.9, 0.99, 1.0):
            k = module.rank_for(share)
            assert module.kept(k) >= share * module.energy * (1 - 1e-9)
            assert k == 1 or module.kept(k - 1) < share * module.energy


def test_text_groups_layers_and_shows_the_history(adaptc, adapter):
    assert adaptc("compress", adapter, "--rank", 3, "-o", "out").code == 0
    said = adaptc("inspect", "out")
    rows = [line.split() for line in said.out.splitlines() if line.startswith("self_attn.")]
    assert [(r[0], r[1]) for r in rows] == [("self_attn.q_proj", "2"), ("self_attn.v_proj", "2")]
    assert "history" in said.out
    assert "truncate{rank=3}" in said.out
    assert "layers.1" in adaptc("inspect", "out", "-v").out


@pytest.mark.parametrize(("key", "value", "flag"), [
    ("lora_B.weight", 0.0, "b is all zero, the module changes nothing"),
    ("lora_A.weight", math.inf, "256 values are not finite"),
])
def test_flags(key, value, flag, adaptc, make):
    make("odd", edit=lambda tensors, config: tensors[f"base_model.model.{Q0}.{key}"].fill_(value))
    said = adaptc("inspect", "odd")
    assert said.code == 0
    assert f"1 of 4 modules: {flag} ({Q0}.weight)" in said.out
    data = adaptc("inspect", "odd", "--json").data
    assert data["modules"][0]["flags"] == [flag]
    assert all(not m["flags"] for m in data["modules"][1:])


def test_numerical_rank_below_the_stored_one_is_flagged(adaptc, make):
    def repeat(tensors, config):
        tensors[f"base_model.model.{Q0}.lora_A.weight"][3:] = 0

    make("padded", edit=repeat)
    flags = adaptc("inspect", "padded", "--json").data["modules"][0]["flags"]
    assert flags == ["rank 8 is stored, numerically it is 3"]


def test_damaged_input_is_one_line(adaptc, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = adaptc("inspect", adapter)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith(f"adaptc: {file}: ")
    assert "truncated" in said.err
    assert len(said.err.splitlines()) == 1


def test_half_pair_is_one_line(adaptc, make):
    make("half", edit=lambda tensors, config: tensors.pop(f"base_model.model.{Q0}.lora_B.weight"))
    said = adaptc("inspect", "half")
    assert said.code == 1
    assert Q0 in said.err
    assert "lora_B" in said.err


def test_plot(adaptc, adapter):
    pytest.importorskip("matplotlib")
    said = adaptc("inspect", adapter, "--plot", "spectrum.png")
    assert (said.code, said.err) == (0, "")
    assert said.out.rstrip().endswith("wrote spectrum.png")
    first = Path("spectrum.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert adaptc("inspect", adapter, "--plot", "spectrum.png").code == 2
    assert Path("spectrum.png").read_bytes() == first
    assert adaptc("inspect", adapter, "--plot", "spectrum.png", "--force").code == 0
    assert "names end in" in adaptc("inspect", adapter, "--plot", "spectrum.txt").err


def test_plot_without_matplotlib_says_what_to_install(adaptc, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = adaptc("inspect", adapter, "--plot", "spectrum.png")
    assert said.code == 2
    assert said.err == "adaptc: --plot needs matplotlib\n  hint: pip install 'adaptc[plot]'\n"
