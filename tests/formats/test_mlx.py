"""MLX: scale is the multiplier, orientation is MLX's own, and what goes out is what mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from files import equal, noise, put, put_config, stored

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import Dense, Hadamard, LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, NeedsError, UnsupportedError

CONFIG: dict[str, Any] = {"fine_tune_type": "lora", "model": "some/base", "num_layers": 2,
                          "lora_parameters": {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}}
TENSORS = {"model.layers.3.self_attn.q_proj.lora_a": noise(24, 4),
           "model.layers.3.self_attn.q_proj.lora_b": noise(4, 24, seed=1),
           "model.layers.3.mlp.up_proj.lora_a": noise(24, 4, seed=2),
           "model.layers.3.mlp.up_proj.lora_b": noise(4, 40, seed=3),
           "model.embed_tokens.lora_a": noise(50, 4, seed=4), "model.embed_tokens.lora_b": noise(4, 24, seed=5),
           "model.layers.3.mlp.switch_mlp.gate_proj.lora_a": noise(3, 4, 24, seed=6),
           "model.layers.3.mlp.switch_mlp.gate_proj.lora_b": noise(3, 8, 4, seed=7)}


def folder(at: Path, tensors: Any = None, config: Any = None, name: str = "adapters.safetensors") -> Path:
    put(put_config(at / "in", CONFIG if config is None else config) / name, TENSORS if tensors is None else tensors)
    return at / "in"


def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """What mlx-lm's LoRALinear adds."""
    return scale * ((x @ a) @ b)


def test_scale_is_the_multiplier_and_alpha_is_nothing(tmp_path: Path) -> None:
    adapter = adaptc.load(folder(tmp_path))
    for stem in ("model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"):
        a, b = TENSORS[f"{stem}.lora_a"].double(), TENSORS[f"{stem}.lora_b"].double()
        x = noise(5, 24, seed=9).double()
        torch.testing.assert_close(x @ adapter.deltas[f"{stem}.weight"].dense().T, forward(x, a, b, 10.0))
    assert adapter.origin.base_model == "some/base"


def test_embeddings_and_experts_are_not_transposed(tmp_path: Path) -> None:
    adapter = adaptc.load(folder(tmp_path))
    a, b = (TENSORS[f"model.embed_tokens.lora_{x}"].double() for x in "ab")
    torch.testing.assert_close(adapter.deltas["model.embed_tokens.weight"].dense(), 10 * a @ b)
    a, b = (TENSORS[f"model.layers.3.mlp.switch_mlp.gate_proj.lora_{x}"].double() for x in "ab")
    torch.testing.assert_close(adapter.deltas["model.layers.3.mlp.switch_mlp.gate_proj.weight"].dense(),
                               10 * torch.einsum("eor,eri->eoi", b, a))


def test_dora(tmp_path: Path) -> None:
    a, b, m, w0 = (noise(*s, seed=i).double() for i, s in enumerate(((8, 2), (2, 6), (6,), (6, 8))))
    config = CONFIG | {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    adapter = adaptc.load(folder(tmp_path, {"x.lora_a": a, "x.lora_b": b, "x.m": m}, config))
    delta = adapter.deltas["x.weight"]
    assert isinstance(delta, NeedsBase)
    v = w0 + (3.0 * b.T) @ a.T
    torch.testing.assert_close(delta.resolve(w0).dense(), m[:, None] * v / v.norm(dim=1, keepdim=True) - w0)


@pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_untouched_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = folder(tmp_path, TENSORS | {"model.norm.weight": noise(24).half()}, name=name)
    out = adaptc.save(adaptc.load(made), tmp_path / "out")
    assert equal(stored(made / name), stored(out / "adapters.safetensors"))
    assert json.loads((out / "adapter_config.json").read_text()) == CONFIG


def test_a_new_rank_keeps_what_mlx_needs(tmp_path: Path) -> None:
    made = folder(tmp_path)
    before = adaptc.load(made)
    small = adaptc.compress(before, rank=2)
    out = adaptc.save(small, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == CONFIG | {"lora_parameters": {"rank": 2, "alpha": 16, "dropout": 0.0, "scale": 1.0}}
    after = adaptc.load(out)
    for key, delta in small.deltas.items():
        torch.testing.assert_close(after.deltas[key].dense(), delta.dense())


def test_one_scale_for_modules_of_several(tmp_path: Path) -> None:
    """PEFT gives every module its own multiplier; MLX has one, the rest goes into lora_b."""
    deltas = {f"model.layers.{i}.self_attn.q_proj.weight": LowRank(noise(2 + i, 8), noise(6, 2 + i), None, s, (6, 8))
              for i, s in enumerate((2.0, 2.0, 0.5))}
    adapter = Adapter(deltas, {}, Origin("peft", {"peft_type": "LORA"}, base_model="b"))
    out = adaptc.save(adapter, tmp_path / "out", dialect="mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == {"fine_tune_type": "lora", "model": "b", "num_layers": -1,
                      "lora_parameters": {"dropout": 0.0, "keys": ["self_attn.q_proj"], "rank": 4, "scale": 2.0}}
    held = stored(out / "adapters.safetensors")
    for key, delta in deltas.items():
        stem = key.removesuffix(".weight")
        assert held[f"{stem}.lora_a"].shape == (8, 4)  # mlx-lm refuses any but the config's rank
        x = noise(3, 8, seed=5)
        got = forward(x, held[f"{stem}.lora_a"], held[f"{stem}.lora_b"], 2.0)
        torch.testing.assert_close(got, (x.double() @ delta.dense().T).float(), rtol=1e-6, atol=1e-6)


def test_full_fine_tune_is_replacement(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": noise(4, 4)}
    made = folder(tmp_path, tensors, {"fine_tune_type": "full", "model": "m", "num_layers": 1})
    adapter = adaptc.load(made)
    assert not adapter.deltas
    assert set(adapter.replaced) == set(tensors)
    out = adaptc.save(adapter, tmp_path / "out")
    assert equal(stored(out / "adapters.safetensors"), tensors)


def test_bare_file_needs_the_multiplier_and_keeps_it(tmp_path: Path) -> None:
    bare = put(tmp_path / "x.safetensors", TENSORS)
    with pytest.raises(NeedsError, match="cannot tell its scale"):
        adaptc.load(bare)
    adapter = adaptc.load(bare, alpha=20)
    assert {d.scale for d in adapter.deltas.values() if isinstance(d, LowRank)} == {20.0}  # --alpha is MLX's scale
    again = adaptc.load(adaptc.save(adapter, tmp_path / "y.safetensors"))
    assert {d.scale for d in again.deltas.values() if isinstance(d, LowRank)} == {20.0}


def test_square_projection_is_not_a_wide_rank(tmp_path: Path) -> None:
    """lora_a (896, 8), lora_b (8, 896): read as PEFT it would be a consistent rank 896."""
    pair = {"q_proj.lora_a": noise(896, 8), "q_proj.lora_b": noise(8, 896)}
    config = CONFIG | {"lora_parameters": {"rank": 8, "scale": 1}}
    delta = adaptc.load(folder(tmp_path, pair, config)).deltas["q_proj.weight"]
    assert isinstance(delta, LowRank)
    assert (delta.rank, delta.shape) == (8, (896, 896))
    with pytest.raises(FormatError, match="not in MLX's order"):
        adaptc.load(put(tmp_path / "t.safetensors", {k: t.T for k, t in pair.items()}), alpha=1)


@pytest.mark.parametrize(("tensors", "config", "says"), [
    ({"x.lora_a": noise(8, 2)}, None, "half an adapter"),
    ({"x.lora_a": noise(8, 4), "x.lora_b": noise(3, 6)}, None, "no common rank"),
    ({"x.lora_a": noise(8, 3), "x.lora_b": noise(3, 6)}, None, "says rank 4, the factors have rank 3"),
    ({"x.lora_a": noise(8, 4), "x.lora_b": noise(4, 6), "x.m": noise(5)}, None, "m has 5 entries"),
    ({"x.lora_a": noise(8, 4), "x.lora_b": noise(4, 6), "x.weight": noise(6, 8)}, None, "both factors and a full"),
    ({"x.y": noise(2)}, None, "none of its 1 tensors"),
    ({"x.lora_a": noise(8, 4), "x.lora_b": noise(4, 6)}, {"lora_parameters": {"scale": "10"}}, "not a number"),
])
def test_damaged(tensors: Any, config: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        adaptc.load(folder(tmp_path, tensors, config))


def test_vlm_adapters_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mlx-vlm"):
        adaptc.load(folder(tmp_path, {"q.A": noise(8, 2), "q.B": noise(2, 8)}, {"rank": 2, "alpha": 0.1, "dropout": 0}))


def test_what_mlx_cannot_say(tmp_path: Path) -> None:
    low = LowRank(noise(2, 36), noise(6, 2), None, 1.0, (6, 4, 3, 3))
    deltas = {"conv.weight": low, "x.bias": Dense(noise(6), 1.0, (6,)),
              "x.weight": LowRank(noise(2, 8), noise(6, 2), None, 1.0, (6, 8)),
              "y.weight": NeedsBase("dora", {"magnitude": noise(6)}, {"axis": 0}, (6, 8),
                                    LowRank(noise(2, 8), noise(6, 2), None, 1.0, (6, 8)))}
    with pytest.raises(LossError) as e:
        adaptc.save(Adapter(deltas, {}, Origin("peft")), tmp_path / "out", dialect="mlx")
    assert len(e.value.losses) == 3
    assert not (tmp_path / "out").exists()


def test_products_wider_than_the_weight_are_narrowed_and_read_back(tmp_path: Path) -> None:
    """LoHa's factors of rank 8 multiply to rank 64 on a 6 x 12 weight, which a reader takes for the wrong order."""
    half = LowRank(noise(8, 12), noise(6, 8, seed=1), None, 1.0, (6, 12))
    deltas = {"a.layers.0.q.weight": Hadamard(half, half, 1.0, (6, 12)),
              "a.layers.0.k.weight": LowRank(noise(4, 32), noise(32, 4, seed=1), None, 1.0, (32, 32))}
    adapter = Adapter(deltas, {}, Origin("peft", {"peft_type": "LOHA"}))
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        back = adaptc.load(adaptc.save(adapter, out, dialect="mlx"))
        assert {d.rank for d in back.deltas.values()} == {6}
        for key, delta in deltas.items():
            torch.testing.assert_close(back.deltas[key].dense(), delta.dense(), rtol=1e-5, atol=1e-5)
