"""Keys as wrappers, old versions and hand-made scripts leave them; bare files; what must never pass silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.adapter import same
from adaptc.errors import AdaptcError, FormatError, LossError, NeedsError, UnsupportedError, UsageError
from adaptc.formats.peft_keys import split
from adaptc.tensorfile import TensorFile, write_tensors

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"], "something_newer": 1}
PLAIN = {"base_model.model.m.q.lora_A.weight": torch.arange(8.0).reshape(2, 4),
         "base_model.model.m.q.lora_B.weight": torch.arange(6.0).reshape(3, 2),
         "base_model.model.m.head.weight": torch.ones(2, 3)}


def folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], pickled: bool = False) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(dict(tensors), path / "adapter_model.bin")
        return path
    with (path / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return path


FORMS: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda k: f"_orig_mod.{k}",
    "data parallel": lambda k: f"module.{k}",
    "fsdp": lambda k: k.replace("m.q.", "_fsdp_wrapped_module.m.q._checkpoint_wrapped_module."),
    "adapter name": lambda k: k.replace("lora_A.w", "lora_A.default.w").replace("lora_B.w", "lora_B.default.w"),
    "other name": lambda k: k.replace("lora_A.w", "lora_A.mine.w").replace("lora_B.w", "lora_B.mine.w"),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "modules_to_save": lambda k: k.replace("head.weight", "head.modules_to_save.default.weight"),
}


@pytest.mark.parametrize("form", FORMS)
def test_wrapped_keys_mean_the_same_and_are_written_plainly(form: str, tmp_path: Path) -> None:
    plain = adaptc.load(folder(tmp_path / "plain", CONFIG, PLAIN))
    other = adaptc.load(folder(tmp_path / "other", CONFIG, {FORMS[form](k): t for k, t in PLAIN.items()}))
    assert same(plain, other)
    out = adaptc.save(other, tmp_path / "out")
    assert set(TensorFile(out / "adapter_model.safetensors")) == set(PLAIN)
    assert json.loads((out / "adapter_config.json").read_text()) == CONFIG


def test_a_pickle_reads_as_its_safetensors(tmp_path: Path) -> None:
    x = adaptc.load(folder(tmp_path / "x", CONFIG, PLAIN))
    assert same(x, adaptc.load(folder(tmp_path / "y", CONFIG, PLAIN, pickled=True)))


def test_only_one_prefix_is_stripped() -> None:
    nested = split({"base_model.model.base_model.model.q.lora_A.weight": torch.ones(1, 1)}, ("lora_",))
    assert list(nested.tuned) == ["base_model.model.q"]


def test_a_module_may_be_called_like_a_parameter() -> None:
    made = split({"base_model.model.lora_q.lora_A.weight": torch.ones(1, 1)}, ("lora_",))
    assert made.tuned == {"lora_q": {"lora_A.weight": torch.ones(1, 1)}}


def bare(path: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    with path.open("wb") as f:
        write_tensors(f, PLAIN if tensors is None else tensors, {})
    return path


def test_a_bare_file_cannot_tell_its_scale(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="cannot tell its scale"):
        adaptc.load(bare(tmp_path / "x.safetensors"))
    adapter = adaptc.load(tmp_path / "x.safetensors", alpha=3)
    assert adapter.deltas["m.q.weight"].scale == 1.5  # type: ignore[union-attr]
    folder(tmp_path / "f", CONFIG, PLAIN)
    with pytest.raises(UsageError, match="config says 3"):
        adaptc.load(tmp_path / "f", alpha=3)


@pytest.mark.parametrize("change", ["untouched", "truncated"])
def test_a_bare_output_carries_its_config(change: str, tmp_path: Path) -> None:
    config = CONFIG | {"use_rslora": True, "modules_to_save": ["head"], "alpha_pattern": {"q": 0.3}}
    adapter = adaptc.load(folder(tmp_path / "in", config, PLAIN))
    if change == "truncated":
        adapter = adaptc.compress(adapter, rank=1)
    out = adaptc.save(adapter, tmp_path / "out.safetensors")
    assert out.is_file()
    again = adaptc.load(out)
    assert same(adapter, again)
    assert [s.spec for s in again.history] == [s.spec for s in adapter.history]
    if change == "untouched":
        assert again.origin.config == config
    back = adaptc.save(again, tmp_path / "back")
    assert same(again, adaptc.load(back))
    if change == "untouched":
        assert json.loads((back / "adapter_config.json").read_text()) == config


def test_a_bare_file_with_alpha_becomes_a_folder_peft_can_inject(tmp_path: Path) -> None:
    adapter = adaptc.load(bare(tmp_path / "x.safetensors"), alpha=3)
    config = json.loads((adaptc.save(adapter, tmp_path / "out") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["m.q"]
    assert (config["r"], config["lora_alpha"]) == (2, 3)


A, B = "base_model.model.m.q.lora_A.weight", "base_model.model.m.q.lora_B.weight"


@pytest.mark.parametrize(("change", "config", "message"), [
    ({B: None}, {}, "lora_A.weight has no lora_B.weight, half an adapter"),
    ({A: None}, {}, "lora_B.weight has no lora_A.weight, half an adapter"),
    ({B: torch.ones(3, 4)}, {}, "lora_B has rank 4, lora_A has rank 2"),
    ({A: torch.ones(0)}, {}, "shard that was not gathered"),
    ({A: torch.ones(8, dtype=torch.int8).reshape(2, 4)}, {}, "holds codes, not factors"),
    ({}, {"r": 4}, "says rank 4, lora_A has rank 2"),
    ({}, {"rank_pattern": {"q": 5}}, "says rank 5"),
    ({}, {"lora_alpha": "many"}, "not a number"),
    ({}, {"rank_pattern": {"(": 2}}, "not a regular expression"),
    ({}, {"use_dora": True}, "lora_magnitude_vector is missing"),
    ({"base_model.model.m.q.lora_magnitude_vector": torch.ones(7)}, {}, "has 7 entries for 3"),
    ({"base_model.model.m.q.lora_A.default.weight": torch.ones(2, 4)}, {}, "two adapters in one file"),
    ({"base_model.model.m.q.hada_w1_a": torch.ones(2, 4)}, {}, "no parameter of this peft_type"),
    ({"base_model.model.m.q.lora_C.weight": torch.ones(2, 4)}, {}, "not a known LoRA parameter"),
    ({"base_model.vera_A": torch.ones(2, 4)}, {}, "no parameter of this peft_type"),
    ({"base_model.stranger": torch.ones(2, 4)}, {}, "belongs to no known part"),
    ({"base_model.model.m.e.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}, {}, "does not list as many"),
    ({"base_model.model.m.head.base_layer.weight": torch.ones(2, 3)}, {}, "both replace m.head.weight"),
    ({"base_model.model.m.q.lora_B.bias": torch.ones(4)}, {}, "lora_B.bias has shape"),
])
def test_damaged_files_are_refused_in_one_clause(change: dict[str, Tensor | None], config: dict[str, Any], message: str,
                                                 tmp_path: Path) -> None:
    tensors = {k: t for k, t in (PLAIN | change).items() if t is not None}
    with pytest.raises((FormatError, UnsupportedError), match=message.replace("(", r"\(")) as refusal:
        adaptc.load(folder(tmp_path / "x", CONFIG | config, tensors))
    assert "\n" not in str(refusal.value)


def test_a_file_without_any_tuned_tensor_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match="holds no tensors"):
        adaptc.load(folder(tmp_path / "x", CONFIG, {}))


def test_an_adapter_of_replacements_alone_has_no_lora_to_write(tmp_path: Path) -> None:
    adapter = adaptc.load(folder(tmp_path / "x", CONFIG, {"base_model.model.m.head.weight": torch.ones(2, 3)}))
    with pytest.raises(LossError, match="no module has factors"):
        adaptc.save(adapter, tmp_path / "out")


@pytest.mark.parametrize(("switch", "value", "word"), [
    ("alora_invocation_tokens", [1, 2], "never merge"), ("layer_replication", [[0, 2], [1, 3]], "replicated"),
    ("arrow_config", {"top_k": 2}, "routed"),
])
def test_switches_that_change_what_an_adapter_is_for_are_told(switch: str, value: Any, word: str, tmp_path: Path
                                                              ) -> None:
    adapter = adaptc.load(folder(tmp_path / "x", CONFIG | {switch: value}, PLAIN))
    assert any(word in note for note in adapter.origin.notes)
    assert json.loads((adaptc.save(adapter, tmp_path / "out") / "adapter_config.json").read_text())[switch] == value
