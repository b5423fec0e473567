"""Codes held as sign planes, other kinds of delta, 4-bit bases, and the Triton kernels behind a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from runtime_models import lora, model, saved, trained
from test_runtime import logits, near, state, unchanged
from torch import Tensor, nn

import adaptc
from adaptc.adapter import Adapter
from adaptc.delta import LowRank
from adaptc.kernels.resident import unpack
from adaptc.kernels.runtime_branch import Low
from adaptc.kernels.runtime_codes import direction, residents
from adaptc.kernels.runtime_packed import PackedLinear, pack_linears
from adaptc.kernels.weight import unpack_weight
from adaptc.quant.bilora import BiLora
from adaptc.quant.quantize import Quantize


def dense(parts: Any, scale: float) -> Tensor:
    total = torch.zeros(())
    for part in parts:
        p, core, q = (t.double() for t in unpack(part))
        total = total + p @ core @ q
    return scale * total


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([-1, 1, 1], 1), ([-3, -1, 1, 3], 2), ([0, 1, -1, 0], 2), ([-4, 3, 0, 1], 3), ([-3, 4, 0, 1], 3), ([0, 5, -7], 4)],
)
def test_direction(codes: list[int], bits: int) -> None:
    """Small integers times anything are found again exactly, in the fewest bits."""
    values = np.array(codes * 9, np.float32) * np.float32(375 / 512) * 2.0**-9
    found = direction(values)
    assert found is not None
    assert found.bits == bits
    assert (found.codes % 2 != 0).all()
    np.testing.assert_allclose(found.codes * found.scale + found.offset, values, rtol=1e-15, atol=0)


def test_no_direction() -> None:
    assert direction(np.random.default_rng(0).standard_normal(4000).astype(np.float32)) is None
    assert direction(np.array([1.0, 1e-30, 3.0], np.float32)) is None


@pytest.mark.parametrize("core", [False, True])
def test_residents(core: bool) -> None:
    """One-bit codes with a mean stay codes, with the mean exact; factors of rank 300 are split; rank 0 is nothing."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 200), torch.randn(120, 5)
    inner = torch.randn(5, 5) if core else None
    coded = LowRank(BiLora.encode(a), BiLora.encode(b), inner, 0.5, (120, 200))
    parts, scale = residents(coded, torch.float32)
    assert [part.packed for part in parts] == [True]
    near(dense(parts, scale), coded.dense(), 1e-6)
    inner = torch.randn(300, 300) if core else None
    wide = LowRank(torch.randn(300, 200), torch.randn(120, 300), inner, 2.0, (120, 200))
    parts, scale = residents(wide, torch.float32)
    assert len(parts) == 2
    near(dense(parts, scale), wide.dense(), 1e-6)
    assert residents(LowRank(a[:0], b[:, :0], None, 1.0, (120, 200)), torch.float32) == ((), 1.0)


def rd(folder: Path, bits: float = 4.0) -> Adapter:
    """Return the adapter of a folder in rate-distortion codes, through its own file."""
    coded = Quantize(bits=bits)(adaptc.load(folder)).adapter
    path = folder / "x.adaptc.safetensors"
    adaptc.save(coded, path, dialect="adaptc")
    return adaptc.load(path)


@pytest.mark.parametrize("kernels", ["auto", "naive"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rate_distortion(family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coded adapter runs as planes and gives what its decoded factors give."""
    monkeypatch.setenv("ADAPTC_KERNELS", kernels)
    saved(family, tmp_path)
    coded = rd(tmp_path)
    m = model(family)
    before = state(m)
    runtime = adaptc.attach(m, coded)
    lows = [b for layer in runtime.layers.values() for bs in layer.branches.values() for b in bs]
    assert any(part.packed for low in lows if isinstance(low, Low) for part in low.parts)
    got = logits(m)
    adaptc.detach(m)
    unchanged(m, before)
    with torch.no_grad():
        for key, delta in coded.deltas.items():
            w = m.get_parameter(key)
            w += (delta.dense().t() if family == "gpt2" else delta.dense()).float()
    near(got, logits(m))


def test_gradient_through_planes(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    m = model("llama")
    layer = m.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 64, requires_grad=True)
    runtime = adaptc.attach(m, coded := rd(tmp_path))
    y = layer(x)
    y.sum().backward()
    w = layer.weight.double() + coded.deltas["model.layers.0.self_attn.q_proj.weight"].dense()
    near(y, x.double() @ w.t())
    assert x.grad is not None
    near(x.grad, w.sum(0).expand(3, -1))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    near(compiled(x), y)
    assert runtime.nbytes > 0


@pytest.mark.parametrize("name", ["lokr", "loha", "vera", "shira"])
def test_other_kinds(name: str, tmp_path: Path) -> None:
    """Kronecker, Hadamard, shared and sparse deltas beside the base, against PEFT."""
    targets = ["q_proj", "up_proj"] if name != "vera" else ["q_proj"]
    config: Any = {
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=3, target_modules=targets),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=3, target_modules=targets),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=targets, projection_prng_key=1),
        "shira": lambda: peft.ShiraConfig(r=2, target_modules=targets),
    }[name]()
    want = saved("llama", tmp_path, config=config)
    m = model("llama")
    before, base = state(m), logits(m)
    adaptc.attach(m, tmp_path)
    near(logits(m), want)
    assert float((base - want).norm() / want.norm()) > 1e-3
    adaptc.detach(m)
    unchanged(m, before)
    if name == "shira":
        adaptc.attach(m, tmp_path, sparse="switch")
        near(logits(m), want)
        assert not any("forward" in module.__dict__ for module in m.modules())
        adaptc.set_active(m)
        assert torch.equal(logits(m), base)
        adaptc.set_active(m, "default")
        adaptc.detach(m)
        unchanged(m, before)


@pytest.mark.parametrize("code", ["nf4", "int4"])
def test_packed_base(code: Any, tmp_path: Path) -> None:
    """Our 4-bit layers with LoRA, DoRA and codes equal the same model in floats of the same values."""
    saved("llama", tmp_path / "dora", config=lora("llama", use_dora=True))
    saved("llama", tmp_path / "rd")
    packed, plain = model("llama"), model("llama")
    assert pack_linears(packed, code) == 14
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            plain.get_submodule(name).weight.data = unpack_weight(module.packed)
    for adapter in (tmp_path / "dora", rd(tmp_path / "rd")):
        for m in (packed, plain):
            adaptc.attach(m, adapter)
        near(logits(packed), logits(plain))
        adaptc.detach(packed)
        adaptc.detach(plain)
        near(logits(packed), logits(plain))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes(nested: bool, tmp_path: Path) -> None:
    """NF4 layers of bitsandbytes through our kernels, fresh or laid out anew by its own first forward."""
    bnb = pytest.importorskip("bitsandbytes")

    def make() -> nn.Module:
        torch.manual_seed(1)
        layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=nested)
        layer.load_state_dict({"weight": torch.randn(64, 128) / 11, "bias": torch.randn(64)})
        return nn.Sequential(layer.to("cpu")).eval()

    x = torch.randn(3, 128)
    for options in ({}, {"use_dora": True}):
        m = make()
        weight = bnb.functional.dequantize_4bit(m[0].weight.data, m[0].weight.quant_state).float()  # type: ignore[index]
        floats = nn.Sequential(nn.Linear(128, 64)).eval()
        floats[0].weight.data, floats[0].bias.data = weight, m[0].bias.detach()  # type: ignore[index, union-attr]
        wrapped = trained(floats, peft.LoraConfig(r=4, target_modules=["0"], **options))
        wrapped.save_pretrained(str(tmp_path))
        with torch.no_grad():
            want = wrapped(x)
            runtime = adaptc.attach(m, tmp_path)
            near(m(x), want)
            assert runtime.layers["0"].coded is not None  # by our kernel, not by a fallback
            adaptc.detach(m)
            base = m(x)
            adaptc.attach(m, tmp_path)
            near(m(x), want, 1e-2)
            adaptc.set_active(m)
            near(m(x), base, 1e-2)
            adaptc.detach(m)
            assert torch.equal(m(x), base)


@pytest.mark.usefixtures("interpreted")
def test_triton(tmp_path: Path) -> None:
    """One adapter fused and a mixed batch from the pool, planes and halves, through the interpreter."""
    net = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 32, bias=False)).eval()
    kept = state(net)
    dense_weights = {}
    for i, (name, dtype) in enumerate({"a": torch.float16, "b": torch.float32, "c": torch.float16}.items()):
        torch.manual_seed(i)
        deltas = {}
        for j, (m, n) in enumerate(((24, 40), (32, 24))):
            a, b = torch.randn(3 + i, n).to(dtype), (torch.randn(m, 3 + i) / 5).to(dtype)
            if name == "b":
                a, b = BiLora.encode(a), BiLora.encode(b)  # type: ignore[assignment]
            deltas[f"{j}.weight"] = LowRank(a, b, None, 0.7, (m, n))
        adapter = Adapter(deltas, {}, adaptc.adapter.Origin("peft"))
        adaptc.attach(net.half() if name != "b" else net, adapter, name, scale=1.5)
        dense_weights[name] = {k: 1.5 * d.dense() for k, d in deltas.items()}
    net.load_state_dict(kept)
    x = torch.randn(4, 3, 40).half()
    each = ["b", "a", None, "c"]

    def want(name: str | None, rows: Tensor) -> Tensor:
        h = rows.double()
        for j in "01":
            w = kept[f"{j}.weight"].half().double()
            w = w if name is None else w + dense_weights[name][f"{j}.weight"]
            h = (h @ w.t() + (kept["0.bias"].half().double() if j == "0" else 0)).half().double()
        return h

    expected = torch.cat([want(name, x[i : i + 1]) for i, name in enumerate(each)])
    with torch.inference_mode():
        with adaptc.set_active(net, each=each) as runtime:
            near(net(x), expected, 1e-2)
            assert runtime._paged is not None
            assert len(runtime._paged.slots) == 6
        for name in ("a", "b"):
            adaptc.set_active(net, name)
            near(net(x), want(name, x), 1e-2)


