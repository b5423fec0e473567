"""PEFT's SHIRA as adaptc writes it, against PEFT itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.adapter import Adapter, Origin, Rows, same
from adaptc.delta import LowRank, Sparse
from adaptc.errors import LossError
from adaptc.formats.peft_shira import rank_of
from adaptc.prune.shira import Sparsify
from adaptc.tensorfile import TensorFile


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.score = nn.Linear(20, 32), nn.Linear(32, 24, bias=False), nn.Linear(24, 3)
        self.config: dict[str, Any] = {"model_type": "net"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.score(self.down(self.up(x).relu()))
        return out


def lora(scale: float = 0.5) -> Adapter:
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    return Adapter({"up.weight": LowRank(t(4, 20), t(32, 4), None, scale, (32, 20)),
                    "down.weight": LowRank(t(4, 32), t(24, 4), None, scale, (24, 32))},
                   {"score.weight": t(3, 24), "score.bias": t(3)}, Origin("peft"))


def test_peft_reloads_it_and_computes_the_same(tmp_path: Path) -> None:
    made = Sparsify(rank=3, accept_loss=True)(lora()).adapter
    adaptc.save(made, tmp_path / "shira")
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "shira")).eval()
    dense, x = Net(), torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for key, delta in made.deltas.items():
            dense.get_parameter(key).add_(delta.dense().float())
        for key, value in made.replaced.items():
            dense.get_parameter(key).copy_(value)  # type: ignore[arg-type]
        wanted = dense(x)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-6, atol=1e-6)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(x), wanted, rtol=1e-6, atol=1e-6)
        for key in made.deltas:
            torch.testing.assert_close(merged.get_parameter(key), dense.get_parameter(key), rtol=1e-6, atol=1e-6)


def test_indices_are_row_by_row_and_values_hold_the_multiplier(tmp_path: Path) -> None:
    adaptc.save(Sparsify(rank=2, accept_loss=True)(lora(-3.0)).adapter, tmp_path / "shira")
    held = TensorFile(tmp_path / "shira" / "adapter_model.safetensors")
    for module, (m, n) in {"up": (32, 20), "down": (24, 32)}.items():
        at, values = (held[f"base_model.model.{module}.shira_{x}"] for x in ("indices", "weight"))
        assert (at.dtype, tuple(at.shape), values.dtype) == (torch.int32, (2, 2 * (m + n)), torch.float32)
        flat = at[0].long() * n + at[1]
        assert bool((flat[1:] > flat[:-1]).all())
        dense = lora(-3.0).deltas[f"{module}.weight"].dense().flatten()
        torch.testing.assert_close(values.double(), dense[flat], rtol=1e-6, atol=1e-6)


def test_it_reads_back_with_its_shapes_and_is_written_again_bit_for_bit(tmp_path: Path) -> None:
    made = Sparsify(rank=3, accept_loss=True)(lora()).adapter
    back = adaptc.load(adaptc.save(made, tmp_path / "one"))
    assert {k: d.shape for k, d in back.deltas.items()} == {"up.weight": (32, 20), "down.weight": (24, 32)}
    assert same(back, made.with_deltas({k: made.deltas[k] for k in back.deltas}))
    adaptc.save(back, tmp_path / "two")
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("one", "two")]
    assert files[0] == files[1]


def test_one_that_peft_trained_is_thinned_and_reloaded(tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), peft.ShiraConfig(r=4, target_modules=["up", "down"], init_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "shira_weight" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    model.save_pretrained(str(tmp_path / "trained"))
    given = adaptc.load(tmp_path / "trained")
    known = Adapter({k: d for k, d in given.deltas.items() if isinstance(d, Sparse)}, {}, given.origin)
    assert known.deltas  # modules whose last row and column are in the mask
    made = Sparsify(rank=2)(known).adapter
    adaptc.save(made, tmp_path / "thin")
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "thin"))
    assert loaded.peft_config["default"].r == 2
    for key, delta in made.deltas.items():
        dw = loaded.get_submodule(f"base_model.model.{key.removesuffix('.weight')}").get_delta_weight("default")
        torch.testing.assert_close(dw.to_dense().double(), delta.dense(), rtol=1e-6, atol=1e-6)
        best = known.deltas[key].values.abs().topk(delta.values.numel() - 1).values.min()  # type: ignore[union-attr]
        assert int((delta.values.abs() >= best).sum()) >= delta.values.numel() - 1  # type: ignore[union-attr]


def test_only_r_times_the_sides_is_shira() -> None:
    made = Sparsify(rank=3, accept_loss=True)(lora()).adapter
    assert rank_of(made) == 3
    assert rank_of(lora()) is None
    assert rank_of(Adapter({}, {}, Origin("peft"))) is None
    up = made.deltas["up.weight"]
    assert isinstance(up, Sparse)
    short = replace(up, indices=up.places()[1:], values=up.values[1:])
    assert rank_of(made.with_deltas({**made.deltas, "up.weight": short})) is None
    assert rank_of(Sparsify(density=0.1, accept_loss=True)(lora()).adapter) is None


@pytest.mark.parametrize(("change", "says"), [
    (lambda a: replace(a, origin=replace(a.origin, layout={"up.weight": "embedding"})), "layout embedding"),
    (lambda a: replace(a, origin=replace(a.origin, config={"fan_in_fan_out": True})), "GPT-2"),
    (lambda a: replace(a, extra={"x": torch.zeros(1)}), "1 carried tensors"),
    (lambda a: replace(a, replaced={"emb.weight": Rows((1,), torch.zeros(1, 4))}), "rows of it are replaced"),
    (lambda a: a.with_deltas({"up.kernel": a.deltas["up.weight"]}), "changes weights"),
])
def test_what_it_cannot_say_is_listed_first(change: Any, says: str, tmp_path: Path) -> None:
    made = change(Sparsify(rank=3, accept_loss=True)(lora()).adapter)
    with pytest.raises(LossError, match=says):
        adaptc.save(made, tmp_path / "shira")
    adaptc.save(made, tmp_path / "shira", allow_loss=True)
