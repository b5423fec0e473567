"""What adaptc writes, PEFT loads: every key, the same merged weights; untouched, truncated, emptied, converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from peft_oracle import Held, distance, merged
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import LossError
from adaptc.formats.peft_config import own_config
from adaptc.resolve import resolved
from adaptc.tensorfile import TensorFile

CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin", "lin2"]},
    "transformers Conv1D": {"target_modules": ["c1d"], "fan_in_fan_out": True},
    "convolutions": {"target_modules": ["conv", "conv1"]},
    "embedding": {"target_modules": ["emb", "lin"]},
    "rslora": {"target_modules": ["lin", "lin2"], "use_rslora": True, "lora_alpha": 6},
    "patterns": {"target_modules": ["lin", "lin2", "c1d"], "rank_pattern": {"^lin": 3, r"blocks\.\d+\.lin": 5},
                 "alpha_pattern": {"blocks.0.lin": 7, "lin2": 2.5}},
    "patterns with rslora": {"target_modules": ["lin", "lin2"], "rank_pattern": {"^lin": 3}, "use_rslora": True,
                             "alpha_pattern": {"blocks.0.lin": 7}},
    "dora": {"target_modules": ["lin", "lin2", "c1d", "conv", "emb"], "use_dora": True},
    "lora_bias": {"target_modules": ["lin"], "lora_bias": True, "lora_alpha": 3},
    "bias lora_only": {"target_modules": ["lin"], "bias": "lora_only"},
    "bias all": {"target_modules": ["lin", "mha"], "bias": "all"},
    "modules_to_save": {"target_modules": ["lin"], "modules_to_save": ["head"]},
    "token rows": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [2, 5]}},
    "experts": {"r": 2, "target_modules": ["lin"],
                "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
                "rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 5}},
    "one expert parameter": {"r": 2, "target_modules": ["lin"], "target_parameters": ["experts.down_proj"]},
    "attention block": {"target_modules": ["mha", "lin"], "use_rslora": True, "rank_pattern": {"mha": 3}},
    "excluded": {"target_modules": ".*lin", "exclude_modules": ["blocks.0.lin"]},
}
MOVED: dict[str, dict[str, Any]] = {
    "pissa": {"target_modules": ["lin", "c1d"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["lin", "lin2"], "init_lora_weights": "olora"},
    "kasa": {"target_modules": ["lin", "lin2"], "kasa_config": {}},
}
BITS: dict[str, Any] = {"r": 4, "lora_alpha": 6}


def ours(adapter: Adapter) -> Mapping[str, Tensor]:
    return merged(adapter, toy.weights(toy.base()), toy.CONV1D)


def config_of(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return made


@pytest.mark.parametrize("case", [*CASES, *MOVED])
def test_untouched_files_come_back_bit_for_bit_with_their_config(case: str, tmp_path: Path) -> None:
    source = toy.trained(tmp_path / "in", **{**BITS, **(CASES | MOVED)[case]})
    adapter = adaptc.load(source)
    assert distance(ours(adapter), toy.reloaded(source)) <= 1e-6
    out = adaptc.save(adapter, tmp_path / "out")
    x, y = TensorFile(source / "adapter_model.safetensors"), TensorFile(out / "adapter_model.safetensors")
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    assert config_of(source) == config_of(out)


@pytest.mark.parametrize("case", CASES)
def test_truncated_files_reload_with_the_weights_we_say(case: str, tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "in", **{**BITS, **CASES[case]}))
    cut = adaptc.compress(adapter, rank=2)
    out = adaptc.save(cut, tmp_path / "out")
    assert distance(ours(cut), toy.reloaded(out)) <= 1e-6
    assert distance(ours(adaptc.load(out)), ours(cut)) <= 1e-7  # biases are rescaled in float32


@pytest.mark.parametrize("case", ["linear", "patterns", "dora", "experts", "attention block", "bias lora_only",
                                  "excluded"])
@pytest.mark.parametrize("which", [0, -1])
def test_modules_that_nothing_is_left_of_are_not_injected(case: str, which: int, tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "in", **{**BITS, **CASES[case]}))
    key = sorted(k for k, d in adapter.deltas.items() if len(d.shape) > 1)[which]
    emptied = adapter.with_deltas({**adapter.deltas, key: rank_zero(adapter.deltas[key])})
    if case == "dora":  # a magnitude without a direction still changes the weight: removed as a whole
        emptied = adapter.with_deltas({k: d for k, d in adapter.deltas.items() if k != key})
        emptied = emptied.with_deltas({**emptied.deltas, key: rank_zero(adapter.deltas[key]).inner})  # type: ignore[union-attr, dict-item]
    out = adaptc.save(emptied, tmp_path / "out")
    assert distance(ours(emptied), toy.reloaded(out)) <= 1e-6
    module = key.removesuffix(".weight").removesuffix(".in_proj_weight")
    if case not in ("experts", "attention block") or key == "lin.weight":
        written = TensorFile(out / "adapter_model.safetensors")
        assert not any(k.startswith(f"base_model.model.{module}.lora_") for k in written)


def rank_zero(delta: Delta) -> Delta:
    if isinstance(delta, NeedsBase):
        return replace(delta, inner=rank_zero(delta.inner))  # type: ignore[arg-type]
    assert isinstance(delta, LowRank)
    return replace(delta, a=delta.a[..., :0, :], b=delta.b[..., :0])  # type: ignore[index]


def test_a_byte_budget_that_empties_modules_still_reloads(tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "in", **BITS, target_modules=["lin", "lin2", "c1d"]))
    small = adaptc.compress(adapter, size=sum(f.stat().st_size for f in (tmp_path / "in").iterdir()) // 3)
    assert any(d.nbytes == 0 for d in small.deltas.values())
    out = adaptc.save(small, tmp_path / "out")
    assert distance(ours(small), toy.reloaded(out)) <= 1e-6


@pytest.mark.parametrize(("kind", "config"), [
    ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 9}), ("Delora", {"r": 3}), ("LoHa", {"r": 2}),
    ("LoKr", {"r": 2, "decompose_both": True, "target_modules": ["lin", "lin2", "conv", "conv1"]}),
    ("Gralora", {"r": 4, "gralora_k": 2}), ("VBLoRA", {"r": 2, "num_vectors": 10, "vector_length": 2}),
    ("Vera", {"r": 3}), ("HRA", {"r": 2}), ("Psoft", {"r": 3}), ("Deft", {"r": 3}), ("Miss", {"r": 2}),
    ("Lora", {"r": 3, "init_lora_weights": "pissa"}), ("Lora", {"r": 3, "init_lora_weights": "olora"}),
    ("Lora", {"r": 3, "kasa_config": {}}),
    ("Lora", {"r": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["lin2"], "target_modules_bd_b": [],
                                     "match_strict": False}}),
])
def test_other_types_become_lora_exactly(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "in", kind, **{"target_modules": ["lin", "lin2"], **config}))
    free = resolved(adapter, Held(toy.weights(toy.base()), toy.CONV1D))
    out = adaptc.save(free, tmp_path / "out")
    assert config_of(out)["peft_type"] == "LORA"
    assert distance(ours(free), toy.reloaded(out)) <= 1e-6


def test_adapters_of_other_dialects_declare_their_heads(tmp_path: Path) -> None:
    pair = LowRank(torch.randn(2, 10), torch.randn(12, 2), None, 0.7, (12, 10))
    bias = Dense(torch.randn(12), 1.0, (12,))
    second = LowRank(torch.randn(3, 12), torch.randn(10, 3), None, 0.2, (10, 12))
    head = {"head.weight": torch.randn(3, 10), "head.bias": torch.randn(3)}
    adapter = Adapter({"lin.weight": pair, "lin.bias": bias}, head, Origin("kohya"))
    out = adaptc.save(adapter, tmp_path / "out", dialect="peft")
    assert config_of(out)["modules_to_save"] == ["head"]
    with pytest.raises(AssertionError):  # a short path also fits the tails of longer ones
        toy.reloaded(out)
    whole = Adapter({"blocks.0.lin.weight": LowRank(torch.randn(2, 10), torch.randn(14, 2), None, 1.5, (14, 10)),
                     "lin2.weight": second}, head, Origin("kohya"))
    out = adaptc.save(whole, tmp_path / "whole", dialect="peft")
    assert distance(ours(whole), toy.reloaded(out)) <= 1e-6


@pytest.mark.parametrize("targets", [["lin"], r".*\.lin|lin", "all-linear"])
def test_modules_that_a_config_does_not_name_are_added_to_it(targets: Any, tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "in", **BITS, target_modules=["lin"]))
    more = LowRank(torch.randn(4, 12), torch.randn(10, 4), None, 1.5, (10, 12))
    config = {**adapter.origin.config, "target_modules": targets}
    joined = replace(adapter.with_deltas({**adapter.deltas, "lin2.weight": more}),
                     origin=replace(adapter.origin, config=config))
    out = adaptc.save(joined, tmp_path / "out")
    if targets == "all-linear":
        assert config_of(out)["target_modules"] == targets
    else:
        assert distance(ours(joined), toy.reloaded(out)) <= 1e-6


def test_losses_are_named_before_anything_is_written(tmp_path: Path) -> None:
    dora = adaptc.load(toy.trained(tmp_path / "dora", **BITS, target_modules=["lin", "lin2"], use_dora=True))
    mixed = dora.with_deltas({**dora.deltas, "lin2.weight": dora.deltas["lin2.weight"].inner})  # type: ignore[union-attr]
    with pytest.raises(LossError, match="dora on 3 modules but not on 1"):
        adaptc.save(mixed, tmp_path / "mixed")
    ia3 = adaptc.load(toy.trained(tmp_path / "ia3", "IA3", target_modules=["lin"], feedforward_modules=[]))
    with pytest.raises(LossError, match="ia3 has no delta without the base"):
        adaptc.save(ia3, tmp_path / "x")
    pissa = adaptc.load(toy.trained(tmp_path / "pissa", **BITS, target_modules=["lin"], init_lora_weights="pissa"))
    shorter = pissa.map(lambda _, d: replace(d, inner=rank_two(d.inner)))  # type: ignore[arg-type, union-attr]
    with pytest.raises(LossError, match="pissa ties its rank"):
        adaptc.save(shorter, tmp_path / "y")
    assert not (tmp_path / "mixed").exists()


def rank_two(delta: LowRank) -> LowRank:
    return replace(delta, a=delta.a[:2], b=delta.b[:, :2])  # type: ignore[index]


def test_training_state_stays_with_untouched_factors_only(tmp_path: Path) -> None:
    config = {"monteclora_config": {"num_samples": 2}, "target_modules": ["lin"]}
    adapter = adaptc.load(toy.trained(tmp_path / "in", **BITS, **config))
    assert adapter.extra
    assert same(adapter, adaptc.load(adaptc.save(adapter, tmp_path / "out")))
    cut = adaptc.compress(adapter, rank=2)
    with pytest.raises(LossError, match="carried tensors"):
        adaptc.save(cut, tmp_path / "cut")
    out = adaptc.save(cut, tmp_path / "cut", allow_loss=True)
    assert config_of(out)["monteclora_config"] is None
    assert distance(ours(cut), toy.reloaded(out)) <= 1e-6


def test_own_config_is_that_of_a_peft_lora_only() -> None:
    assert own_config(Adapter({}, {}, Origin("kohya", {"peft_type": "LORA"}))) is None
    assert own_config(Adapter({}, {}, Origin("peft", {"peft_type": "VERA"}))) is None
