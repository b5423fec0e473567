"""Merging against PEFT: its own add_weighted_adapter in factor space, and our files loaded by it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.adapter import Adapter
from adaptc.squeeze.merge import Merge

peft = pytest.importorskip("peft")
NAMES = ("one", "two", "three")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        return self.down(torch.relu(self.up(self.conv(x[:, None]).mean(1))))


@pytest.fixture
def trained(tmp_path: Path):
    """A PEFT model with three random adapters, and the same read by adaptc."""
    def build(modules: list[str], ranks=(4, 4, 4), alphas=(8, 4, 6)):
        torch.manual_seed(0)
        base = Toy()
        torch.manual_seed(1)
        model = None
        for name, r, alpha in zip(NAMES, ranks, alphas, strict=True):
            config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, init_lora_weights=False)
            if model is None:
                model = peft.get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        model.save_pretrained(tmp_path)
        return model, [adaptc.load(tmp_path / name) for name in NAMES]

    return build


def theirs(model, out: Path, kind: str, weights, **kw) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(NAMES), list(weights), "merged", combination_type=kind, **kw)
        model.save_pretrained(out, selected_adapters=["merged"])
    return adaptc.load(out / "merged")


def apart(x: Adapter, y: Adapter) -> float:
    assert set(x.deltas) == set(y.deltas)
    return max(float((x.deltas[k].dense() - y.deltas[k].dense()).norm() / y.deltas[k].dense().norm()) for k in x.deltas)


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (1.0, 0.5, -0.7)])
@pytest.mark.parametrize(("kind", "method", "options"), [
    ("linear", "linear", {}), ("cat", "cat", {}), ("svd", "exact", {"rank": 4}),
    ("ties", "ties", {"density": 0.4, "space": "factors"}),
    ("magnitude_prune", "magnitude", {"density": 0.4, "space": "factors"}),
    ("dare_linear", "dare-linear", {"density": 1.0, "space": "factors"}),
    ("dare_ties", "dare-ties", {"density": 1.0, "space": "factors"}),
])
def test_parity_with_add_weighted_adapter(trained, tmp_path, kind, method, options, weights) -> None:
    model, adapters = trained(["up", "down"])
    given = {"density": options["density"]} if "density" in options else {}
    if kind == "svd":
        given = {"svd_rank": 4}
    reference = theirs(model, tmp_path / "out", kind, weights, **given)
    assert apart(Merge(method=method, weights=weights, **options)(adapters).adapter, reference) < 2e-6


def test_dare_in_factor_space_drops_and_rescales_each_factor(trained) -> None:
    _, adapters = trained(["up"])
    out = Merge(method="dare-linear", weights=(1.0, 0.0, 0.0), density=0.5, space="factors", seed=4)(adapters).adapter
    (key, made), first = next(iter(out.deltas.items())), adapters[0]
    root = first.deltas[key].scale ** 0.5
    for side in ("a", "b"):
        got, was = getattr(made, side), getattr(first.deltas[key], side) * root / 0.5
        kept = got != 0
        assert torch.allclose(got[kept], was[kept], rtol=1e-5)
        assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("modules", [["up", "down"], ["emb", "conv", "up"]])
def test_peft_runs_a_merged_file_as_the_weighted_sum(trained, tmp_path, modules) -> None:
    """Linear, Conv2d and Embedding of different ranks: outputs equal the model with every weighted dW added."""
    _, adapters = trained(modules, ranks=(2, 3, 4))
    weights = (0.5, 0.25, -0.5)
    adaptc.save(Merge(method="cat", weights=weights)(adapters).adapter, tmp_path / "merged")
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Toy(), tmp_path / "merged").eval()
    torch.manual_seed(0)
    plain = Toy().eval()
    state = plain.state_dict()
    for key in adapters[0].deltas:
        dw = sum(w * a.deltas[key].dense() for w, a in zip(weights, adapters, strict=True))
        state[key] += (dw.T if key == "emb.weight" and dw.shape != state[key].shape else dw).float()
    plain.load_state_dict(state)
    ids = torch.arange(10).reshape(2, 5)
    assert torch.allclose(model(ids), plain(ids), atol=1e-5)


def test_a_merge_without_its_heads_loads_as_a_plain_adapter(trained, tmp_path) -> None:
    """PEFT refuses a classification adapter whose file has no head, so the merged config no longer claims to be one."""
    from dataclasses import replace

    _, adapters = trained(["up"])
    headed = [replace(a, replaced={"down.weight": torch.full((12, 20), float(i)), "down.bias": torch.zeros(12)},
                      origin=replace(a.origin, config={**a.origin.config, "task_type": "SEQ_CLS",
                                                       "modules_to_save": ["down"]})) for i, a in enumerate(adapters)]
    out = Merge(heads="drop")(headed).adapter
    assert out.origin.config["task_type"] is None
    assert out.origin.config["modules_to_save"] is None
    peft.PeftModel.from_pretrained(Toy(), adaptc.save(out, tmp_path / "dropped"))
    kept = Merge(heads="first")(headed).adapter
    assert kept.origin.config["modules_to_save"] == ["down"]
    model = peft.PeftModel.from_pretrained(Toy(), adaptc.save(kept, tmp_path / "kept"))
    assert not model.base_model.model.down.modules_to_save["default"].weight.any()
