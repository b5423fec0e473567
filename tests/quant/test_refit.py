from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adaptc.errors import UsageError
from adaptc.quant.rd import Budget, Module, decode, encode, scale_gains
from adaptc.quant.refit import refit_gains


def made() -> tuple[nn.Sequential, dict[str, Module], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 10)).requires_grad_(False)
    rng = np.random.default_rng(0)
    modules = {
        "0": Module(rng.standard_normal((48, 6)) * 0.7 ** np.arange(6), rng.standard_normal((6, 32)) * 0.3, 1.0),
        "2": Module(rng.standard_normal((10, 6)) * 0.7 ** np.arange(6), rng.standard_normal((6, 48)) * 0.3, 1.0),
    }
    stretch = torch.logspace(-1, 1, 32)  # inputs far from white: plain least squares is not what the outputs want
    return model, modules, [torch.randn(64, 32) * stretch for _ in range(12)]


def divergence(model: nn.Sequential, modules: dict[str, Module], factors: dict, batch: torch.Tensor) -> float:
    def run(pairs: dict) -> torch.Tensor:
        x = batch
        for name, layer in model.named_children():
            y = layer(x)
            if name in pairs:
                b, a = pairs[name]
                y = y + x @ torch.as_tensor(a).float().T @ torch.as_tensor(np.ascontiguousarray(b)).float().T
            x = y
        return x.log_softmax(-1)

    target, found = run({k: (m.scale * m.b, m.a) for k, m in modules.items()}), run(factors)
    return float((target.exp() * (target - found)).sum(-1).mean())


def test_refitted_gains_bring_held_out_outputs_nearer_without_a_byte_of_payload() -> None:
    model, modules, batches = made()
    code = encode(modules, Budget(bits_per_param=1.0))
    reference = {k: (torch.tensor(m.b).float(), torch.tensor(m.a).float()) for k, m in modules.items()}
    better = refit_gains(model, {k: model[int(k)] for k in modules}, reference, code, batches[:10], epochs=12)
    assert better.payload == code.payload
    assert abs(len(better.index) - len(code.index)) <= 4
    held = torch.cat(batches[10:])
    assert divergence(model, modules, decode(better), held) < 0.9 * divergence(model, modules, decode(code), held)
    assert not model[0]._forward_hooks


def test_scaled_gains_scale_columns_and_bad_factors_are_refused() -> None:
    _, modules, _ = made()
    code = encode(modules, Budget(bits_per_param=2.0))
    before = decode(code)
    factors = {k: np.full(len(a), 1.5) for k, (_, a) in before.items()}
    for name, (b, a) in decode(scale_gains(code, factors)).items():
        old = before[name][0].astype(float) @ before[name][1]
        np.testing.assert_allclose(b.astype(float) @ a, 1.5 * old, rtol=0.1, atol=0.05 * np.abs(old).max())
    for bad in (np.zeros(len(before["0"][1])), np.ones(1), np.full(len(before["0"][1]), np.nan)):
        with pytest.raises(UsageError, match="positive factors"):
            scale_gains(code, factors | {"0": bad})
