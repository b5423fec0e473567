from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tokens, write_lora

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.prune.cuts import Cut
from adaptc.prune.index_map import NAME, read_map, write_map
from adaptc.prune.loraprune import Options, open_model, prune
from adaptc.prune.recover import recover

Written = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "phi3"])
def test_recovering_a_pruned_adapter_is_the_adapter_on_what_stayed(kind: str, written: Written, tmp_path: Path) -> None:
    base, lora = written(kind)
    before = adaptc.load(lora)
    done = prune(open_model(base), before, Options(ratio=0.4, criterion="magnitude", multiple=1), out=tmp_path / "out")
    whole = recover(adaptc.load(tmp_path / "out" / "adapter"), read_map(tmp_path / "out" / NAME)[0])
    assert list(whole.deltas) == list(before.deltas)
    cuts = {open_model(base).base.name_of(k): k for k in before.deltas}
    changed = 0
    for name, key in cuts.items():
        expected = before.deltas[key].dense()
        if name in done.cuts:
            expected = done.cuts[name].mask(expected)
            changed += 1
        assert torch.equal(whole.deltas[key].dense(), expected)
    assert changed


def test_an_adapter_trained_small_runs_on_the_whole_model(written: Written, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    base, lora = written("llama")
    prune(open_model(base), adaptc.load(lora), Options(ratio=0.4, criterion="magnitude", multiple=1),
          out=tmp_path / "out")
    trained = write_lora(tmp_path / "trained", tmp_path / "out", seed=5)
    adaptc.save(recover(adaptc.load(trained), read_map(tmp_path / "out" / NAME)[0]), tmp_path / "whole")
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "whole")
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens()).logits).all())


def test_an_adapter_that_is_not_of_the_pruned_model_is_refused(written: Written) -> None:
    _, lora = written("llama")
    adapter = adaptc.load(lora)
    key = next(iter(adapter.deltas))
    with pytest.raises(FormatError, match="the map keeps"):
        recover(adapter, {key: Cut(adapter.deltas[key].shape, torch.tensor([0, 1]))})
    with pytest.raises(FormatError, match="no module of the adapter is in the map"):
        recover(adapter, {"elsewhere.weight": Cut((4, 4), torch.tensor([0]))})


def test_carried_parts_of_pruned_parameters_cannot_come_back() -> None:
    pair = LowRank(torch.ones(1, 4), torch.ones(2, 1), None, 1.0, (2, 4))
    adapter = Adapter({"up.weight": pair}, {"up.bias": torch.ones(2)}, Origin("peft"))
    cuts = {"up.weight": Cut((5, 4), torch.tensor([1, 2])), "up.bias": Cut((5,), torch.tensor([1, 2]))}
    with pytest.raises(UnsupportedError, match=r"up\.bias: the adapter carries it whole"):
        recover(adapter, cuts)


@pytest.mark.parametrize(("index", "message"), [([2, 1], "no sorted list"), ([1, 9], "no sorted list")])
def test_a_map_that_contradicts_itself_is_refused(index: list[int], message: str, tmp_path: Path) -> None:
    write_map(tmp_path / NAME, {"w": Cut((4, 4), torch.tensor(index))}, {})
    with pytest.raises(FormatError, match=message):
        read_map(tmp_path / NAME)


def test_a_map_that_is_not_there_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="does not exist"):
        read_map(tmp_path / NAME)
