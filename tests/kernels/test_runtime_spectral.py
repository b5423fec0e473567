"""Spectral adapters beside a model: the logits of a model whose weights hold them, for every kind of transform."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runtime_models import ids, model
from torch import nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.calibration import Calibration, write_calibration
from adaptc.errors import FormatError
from adaptc.kernels import walsh
from adaptc.kernels.walsh.branch import SpectralBeside
from adaptc.passes import Context
from adaptc.quant.golomb import Golomb
from adaptc.quant.qwha import QWHA
from adaptc.quant.qwha_base import layers, rewritten
from adaptc.quant.walsh import name_for, transform
from adaptc.spectral import Spectral


def coefficients(out: int, n: int, seed: int, coded: bool = False) -> Spectral:
    g = torch.Generator().manual_seed(seed)
    count = out * n // 12
    at = torch.randperm(out * n, generator=g)[:count].sort().values
    values = torch.randn(count, generator=g)
    return Spectral(Golomb.encode(at, out * n, n) if coded else at, values, name_for(n), 0.2, (out, n))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_logits_are_those_of_merged_weights(family: str) -> None:
    base, merged = model(family), model(family)
    deltas, parameters = {}, dict(merged.named_parameters())
    for i, (name, module) in enumerate(base.named_modules()):
        turned = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or turned) and not name.endswith(("lm_head", "classifier", "pooler.dense")):
            out, n = tuple(module.weight.shape)[::-1] if turned else tuple(module.weight.shape)
            delta = deltas[f"{name}.weight"] = coefficients(out, n, i, coded=i % 2 == 0)
            dw = delta.dense().float()
            parameters[f"{name}.weight"].data += dw.T if turned else dw
    assert {d.transform.partition(":")[0] for d in deltas.values()} & {"sylvester", "paley1", "paley2"}
    with torch.no_grad():
        plain, expected = base(ids()).logits, merged(ids()).logits
        adaptc.attach(base, Adapter(deltas, {}, Origin("adaptc")))
        effect = float((expected - plain).abs().max())
        assert effect > 1e-3
        assert float((base(ids()).logits - expected).abs().max()) < 2e-4 * effect + 1e-6
        adaptc.detach(base)
        assert torch.equal(base(ids()).logits, plain)


@pytest.mark.parametrize("n", [32, 24, 18, 344, 924, 107 * 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_of_any_width(n: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(n, 10).to(dtype)
    delta = coefficients(10, n, n)
    x = torch.randn(3, 5, n).to(dtype)
    with torch.no_grad():
        expected = layer(x).double() + x.double() @ delta.dense().T
        holder = nn.Sequential(layer)
        adaptc.attach(holder, Adapter({"0.weight": delta}, {}, Origin("adaptc")), scale=1.0)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
        torch.testing.assert_close(holder(x).double(), expected, **close)


def test_gradients_reach_the_inputs() -> None:
    delta = coefficients(6, 24, 1)
    holder = nn.Sequential(nn.Linear(24, 6))
    adaptc.attach(holder, Adapter({"0.weight": delta}, {}, Origin("adaptc")))
    x = torch.randn(4, 24, requires_grad=True)
    holder(x).square().sum().backward()  # type: ignore[no-untyped-call]
    w = holder[0].weight.detach().double() + delta.dense()
    y = x.detach().double() @ w.T + holder[0].bias.detach().double()
    torch.testing.assert_close(x.grad, (2 * y @ w).float(), rtol=1e-4, atol=1e-4)


def test_only_small_orders_go_to_the_gpu_kernel() -> None:
    def branch(n: int) -> SpectralBeside:
        from adaptc.kernels.sparse import by_rows

        return SpectralBeside(by_rows(torch.tensor([0]), torch.ones(1), (4, n)), transform(name_for(n), n), 1.0)

    had = branch(24).had
    assert had is not None
    assert had.shape == (12, 12)
    assert branch(344).had is None
    assert branch(2**15).had is None
    had = branch(32).had
    assert had is not None
    assert had.tolist() == [[1.0]]


def test_products_with_small_matrices_equal_the_butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 12 * 256)
    had = transform("paley1:12", 12).matrix().float() * 12**0.5
    monkeypatch.setenv("ADAPTC_KERNELS", "naive")
    expected = walsh.transform(x, had, 256)
    monkeypatch.setenv("ADAPTC_KERNELS", "auto")
    torch.testing.assert_close(walsh.transform(x, had, 256), expected, rtol=1e-5, atol=1e-5)


def test_a_written_base_loads_in_transformers_and_takes_the_adapter_alone(tmp_path: Path) -> None:
    import transformers

    model("llama").save_pretrained(tmp_path / "base")
    base = Base(tmp_path / "base")
    keys = [k for k in base if k.endswith("proj.weight")]
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(300, n, generator=g) @ torch.randn(n, n, generator=g) for n in (64, 112)}
    moments = {k: x[base[k].shape[1]].T @ x[base[k].shape[1]] / 300 for k in keys}
    write_calibration(tmp_path / "s.safetensors", moments, {"tokens": 300})
    calibration = Calibration(tmp_path / "s.safetensors")
    with rewritten(base, tmp_path / "int4") as put:
        made, _ = QWHA(quant="int4", rank_budget=4).measured(layers(base, calibration, None),
                                                             Context(base, calibration, jobs=1), put)
    adaptc.save(made.adapter, tmp_path / "a.adaptc.safetensors")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()
    for key, delta in made.adapter.deltas.items():
        merged.get_parameter(key).data += delta.dense().float()
    with torch.no_grad():
        adaptc.attach(quantised, tmp_path / "a.adaptc.safetensors")
        torch.testing.assert_close(quantised(ids()).logits, merged(ids()).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(FormatError, match="fingerprint"):
            adaptc.attach(model("llama"), tmp_path / "a.adaptc.safetensors")
