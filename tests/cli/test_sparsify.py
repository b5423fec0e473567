"""adaptc sparsify on the command line: refused, written, measured, reloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adaptc as library
from adaptc.calibration import write_calibration
from adaptc.delta import Sparse
from adaptc.tensorfile import write_tensors


def test_a_lora_is_refused_in_one_line_and_nothing_is_written(adapter, adaptc):
    said = adaptc("sparsify", adapter, "--density", "0.02")
    assert said.code == 1
    assert said.out == ""
    first, hint = said.err.splitlines()
    assert first.startswith("adaptc: adapter: ")
    assert "of the entries keep" in first
    assert "below 50 %" in first
    assert "--accept-loss" in hint
    assert sorted(p.name for p in Path().iterdir()) == ["adapter"]


def test_accepted_loss_is_written_and_told(adapter, adaptc):
    said = adaptc("sparsify", adapter, "--density", "0.02", "--accept-loss")
    assert said.code == 0, said.err
    assert "wrote adapter-d0.02/" in said.out
    assert "energy kept" in said.out
    back = library.load("adapter-d0.02")
    assert all(isinstance(d, Sparse) for d in back.deltas.values())
    assert "score.weight" in back.replaced
    assert back.history[-1].spec == "sparsify{density=0.02,accept_loss=true}"
    assert adaptc("verify", "adapter-d0.02").code == 0


def test_json_holds_every_mask(adapter, adaptc):
    said = adaptc("sparsify", adapter, "--density", "0.3", "--min-energy", "0", "--json", "--dry-run")
    data = said.data
    assert not data["written"]
    assert [m["entries"] for m in data["masks"]] == [round(0.3 * s * 32) for s in (24, 16, 24, 16)]
    assert data["kept"] == pytest.approx(1 - data["error"] ** 2)
    assert data["masks"][0]["kept"] == pytest.approx(1 - data["modules"][0]["error"] ** 2)
    assert data["output_error"] == {"train": None, "held": None}
    assert not Path("adapter-d0.3").exists()


def test_like_rank_writes_peft(adapter, adaptc):
    said = adaptc("sparsify", adapter, "--count-like-rank", "2", "--accept-loss")
    assert said.code == 0, said.err
    config = json.loads(Path("adapter-k2/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("SHIRA", 2, ["score"])
    back = library.load("adapter-k2")
    assert {tuple(d.shape) for d in back.deltas.values()} == {(24, 32), (16, 32)}


def test_a_size_holds(adapter, adaptc):
    said = adaptc("sparsify", adapter, "--size", "12KB", "--accept-loss", "-o", "out.adaptc.safetensors")
    assert said.code == 0, said.err
    assert 11_000 < Path("out.adaptc.safetensors").stat().st_size <= 12_000


def test_outputs_are_measured_on_both_splits(adapter, adaptc, tmp_path):
    keys = [k for k in library.load(adapter).deltas]
    x = torch.randn(100, 32)
    some = {k: (x.T @ x / 100) for k in keys}
    write_calibration(tmp_path / "s.safetensors", some, {"tokens": 100}, held=some)
    said = adaptc("sparsify", adapter, "--density", "0.3", "--calibration", "s.safetensors", "--mask", "activation",
                  "--min-energy", "0.1")
    assert said.code == 0, said.err
    assert "outputs, train" in said.out
    assert "outputs, held out" in said.out


def write_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with (folder / "model.safetensors").open("wb") as f:
        write_tensors(f, weights, {})
    return folder


def test_the_change_of_a_model_is_extracted(adaptc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"m.layers.0.q_proj.weight": torch.randn(32, 24), "m.norm.weight": torch.randn(24)}
    tuned = {k: v.clone() for k, v in base.items()}
    tuned["m.layers.0.q_proj.weight"].view(-1)[[5, 700]] = 3.0
    tuned["m.norm.weight"] += 1
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    said = adaptc("sparsify", "tuned", "--density", "0.01")
    assert said.code == 1
    assert said.err.splitlines()[0] == "adaptc: tuned is a whole model, and its change needs the base"
    said = adaptc("sparsify", "tuned", "--base", "base", "--density", "0.01")
    assert said.code == 0, said.err
    back = library.load("tuned-d0.01")
    (key, delta), = back.deltas.items()
    assert isinstance(delta, Sparse)
    assert delta.places().tolist() == [5, 700]
    assert torch.allclose(base[key].double() + delta.dense(), tuned[key].double(), rtol=0, atol=5e-7)
    assert torch.equal(back.replaced["m.norm.weight"], tuned["m.norm.weight"])
    assert back.origin.fingerprint
    assert adaptc("verify", "tuned-d0.01", "--base", "base").code == 0


def test_what_a_model_holds_beyond_is_lost_only_when_allowed(adaptc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"m.q.weight": torch.randn(8, 8), "m.emb.weight": torch.zeros(9, 1 << 17)}
    tuned = {"m.q.weight": base["m.q.weight"] + torch.eye(8), "m.emb.weight": torch.zeros(10, 1 << 17)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    said = adaptc("sparsify", "tuned", "--base", "base", "--density", "0.2")
    assert said.code == 1
    assert "lost: m.emb.weight: shape (10, 131072), where the base has shape (9, 131072)" in said.err
    assert adaptc("sparsify", "tuned", "--base", "base", "--density", "0.2", "--allow-loss").code == 0


@pytest.mark.parametrize(("options", "says", "code"), [
    ([], "got none", 2), (["--density", "0"], "density is 0", 2), (["--density", "0.1", "--size", "1MB"], "one of", 2),
    (["--density", "0.1", "--mask", "snip"], "base", 1),
    (["--density", "0.1", "--mask", "activation"], "statistics", 1),
    (["--count-like-rank", "14"], "entries are more than its", 2),
    (["--density", "0.1", "--base", "nowhere"], "nowhere", 1),
])
def test_wrong_requests_are_one_line(adapter, adaptc, options, says, code):
    said = adaptc("sparsify", adapter, *options)
    assert said.code == code, said.err
    assert says in said.err
    assert "Traceback" not in said.err


def test_compare_shows_the_overlap_of_sparse_adapters(make, adaptc):
    for i, name in enumerate("ab"):
        out = f"{name}.adaptc.safetensors"
        adaptc("sparsify", make(name, seed=i), "--density", "0.3", "--min-energy", "0", "-o", out)
    said = adaptc("compare", "a.adaptc.safetensors", "b.adaptc.safetensors")
    assert said.code == 0, said.err
    assert "AWOM" in said.out
    data = adaptc("compare", "a.adaptc.safetensors", "b.adaptc.safetensors", "--json").data
    pair = data["modules"][0]["pairs"][0]
    assert 0 < pair["common"] < 1
    assert pair["shared_output"] is None
    assert pair["awom"] > 0
    assert 0 <= pair["awor"] <= 1
