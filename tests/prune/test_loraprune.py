from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_models import CONFIGS, SLIM_HEADS, model_class, tokens, write_base, write_lora
from torch import Tensor, nn

import adaptc
from adaptc.adapter import same
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.prune.index_map import NAME, read_map
from adaptc.prune.loraprune import Options, Pruned, open_model, prune
from adaptc.tensorfile import TensorFile

Written = Callable[[str], tuple[Path, Path]]


def run(base: Path, adapter: Path) -> Tensor:
    """Return the logits that plain transformers and PEFT compute."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    model = PeftModel.from_pretrained(model_class(kind).from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(tokens()).logits


def run_masked(base: Path, adapter: Path, done: Pruned) -> Tensor:
    """Return the logits of the whole model with the inputs of every pruned column set to zero as it runs."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    model = PeftModel.from_pretrained(model_class(kind).from_pretrained(base), adapter).eval()
    modules: dict[str, nn.Module] = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    count = 0
    for key, cut in done.cuts.items():
        if cut.cols is None:
            continue
        kept = torch.zeros(cut.shape[1])
        kept[cut.cols] = 1.0
        modules[key.removesuffix(".weight")].register_forward_pre_hook(lambda m, args, kept=kept: (args[0] * kept,))
        count += 1
    assert count
    with torch.no_grad():
        return model(tokens()).logits


def pruned(written: Written, kind: str, out: Path, **options: Any) -> tuple[Path, Path, Pruned]:
    base, lora = written(kind)
    given = {"ratio": 0.4, "criterion": "magnitude", "multiple": 1, **options}
    return base, lora, prune(open_model(base, given.get("unit", "auto")), adaptc.load(lora), Options(**given), out=out)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_smaller_model_computes_what_the_masked_one_does(kind: str, written: Written, tmp_path: Path) -> None:
    base, lora, done = pruned(written, kind, tmp_path / "out")
    small = run(tmp_path / "out", tmp_path / "out" / "adapter")
    torch.testing.assert_close(small, run_masked(base, lora, done), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small, run(base, lora), atol=1e-2)
    slim = kind in SLIM_HEADS
    assert done.removed("heads") == (pytest.approx(1 / 3, abs=1e-9) if slim else 0.0)
    assert done.removed("heads", "ffn") == pytest.approx(0.4, abs=0.02) if slim else done.removed("ffn") > 0.35


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "phi3"])
def test_masking_zeroes_in_place(kind: str, written: Written, tmp_path: Path) -> None:
    base, lora, done = pruned(written, kind, tmp_path / "out", masked=True, keep_first=1, ratio=0.5)
    assert not any("layers.0." in k or "layer.0." in k or ".h.0." in k for k in done.cuts)
    assert done.removed("heads") > 0
    torch.testing.assert_close(run(tmp_path / "out", tmp_path / "out" / "adapter"), run_masked(base, lora, done),
                               rtol=1e-5, atol=1e-5)
    before, after = (TensorFile(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert {k: v[1] for k, v in before.info.items()} == {k: v[1] for k, v in after.info.items()}
    new, old = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", base))
    assert new == old


def test_single_queries_keep_every_key_value_head(written: Written, tmp_path: Path) -> None:
    base, lora, done = pruned(written, "qwen3", tmp_path / "out", unit="query")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 8)
    torch.testing.assert_close(run(tmp_path / "out", tmp_path / "out" / "adapter"), run_masked(base, lora, done),
                               rtol=1e-5, atol=1e-5)
    assert "model.layers.0.self_attn.k_proj.weight" not in done.cuts


@pytest.mark.parametrize("kind", SLIM_HEADS)
def test_widths_are_whole_heads_in_their_old_proportion(kind: str, written: Written, tmp_path: Path) -> None:
    _, _, done = pruned(written, kind, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    before = CONFIGS[kind][0]
    queries = before["num_attention_heads"] // before["num_key_value_heads"]
    assert config.num_attention_heads == queries * config.num_key_value_heads == queries * 2
    assert config.head_dim == before["head_dim"]
    rows = {k.split(".")[-2]: c for k, c in done.cuts.items() if ".layers.1." in k and k.endswith(".weight")}
    assert rows["o_proj"].cols is not None
    starts = rows["o_proj"].cols.reshape(-1, queries * config.head_dim)
    torch.testing.assert_close(starts, starts[:, :1] + torch.arange(queries * config.head_dim))
    if kind != "phi3":
        assert rows["k_proj"].rows is not None
        heads = rows["k_proj"].rows.reshape(-1, config.head_dim)[:, 0] // config.head_dim
        assert heads.tolist() == (starts[:, 0] // (queries * config.head_dim)).tolist()


def test_slicing_then_merging_is_merging_then_slicing(written: Written, tmp_path: Path) -> None:
    base, lora, done = pruned(written, "llama", tmp_path / "out")
    def merge(folder: Path, adapter: Path) -> dict[str, Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()

    small, whole = merge(tmp_path / "out", tmp_path / "out" / "adapter"), merge(base, lora)
    assert set(small) == set(whole)
    for key, w in whole.items():
        expected = w
        if key in done.cuts:
            for axis, index in enumerate((done.cuts[key].rows, done.cuts[key].cols)):
                expected = expected if index is None else expected.index_select(axis, index)
        torch.testing.assert_close(small[key], expected, rtol=1e-6, atol=1e-6)


def test_ratio_zero_copies_bit_for_bit(written: Written, tmp_path: Path) -> None:
    base, lora, done = pruned(written, "llama", tmp_path / "out", ratio=0.0)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert same(adaptc.load(tmp_path / "out" / "adapter"), adaptc.load(lora))
    assert done.removed() == 0.0
    assert done.cuts == {}


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1])
def test_a_ratio_that_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="must be 0"):
        Options(ratio=ratio)


def test_shards_are_cut_one_by_one(written: Written, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    lora = write_lora(tmp_path / "lora", base)
    assert len(list(base.glob("*.safetensors"))) > 2
    done = prune(open_model(base), adaptc.load(lora), Options(ratio=0.3, criterion="adapter"), out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = [TensorFile(p) for p in (tmp_path / "out").glob("model-*.safetensors")]
    assert index["metadata"]["total_size"] == sum(f.nbytes(n) for f in files for n in f)
    assert set(index["weight_map"]) == {n for f in files for n in f}
    torch.testing.assert_close(run(tmp_path / "out", tmp_path / "out" / "adapter"), run_masked(base, lora, done),
                               rtol=1e-5, atol=1e-5)


def test_a_pruned_model_can_be_pruned_again(written: Written, tmp_path: Path) -> None:
    pruned(written, "mistral", tmp_path / "first")
    adapter = adaptc.load(tmp_path / "first" / "adapter")
    prune(open_model(tmp_path / "first"), adapter, Options(ratio=0.5, criterion="magnitude", multiple=1),
          out=tmp_path / "second")
    logits = run(tmp_path / "second", tmp_path / "second" / "adapter")
    assert bool(torch.isfinite(logits).all())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "second").num_key_value_heads == 1


def test_the_map_says_what_stayed(written: Written, tmp_path: Path) -> None:
    _, _, done = pruned(written, "llama", tmp_path / "out")
    cuts, about = read_map(tmp_path / "out" / NAME)
    assert set(cuts) == set(done.cuts)
    for key, cut in cuts.items():
        assert cut.shape == done.cuts[key].shape
        for a, b in ((cut.rows, done.cuts[key].rows), (cut.cols, done.cuts[key].cols)):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    assert about["model_type"] == "llama"
    assert about["spec"].startswith("loraprune{ratio=0.4")


def test_the_adapter_names_its_new_base(written: Written, tmp_path: Path) -> None:
    _, lora, _ = pruned(written, "llama", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out")
    old = json.loads((lora / "adapter_config.json").read_text())
    assert {k: v for k, v in config.items() if k != "base_model_name_or_path"}.items() >= {
        k: old[k] for k in ("r", "lora_alpha", "peft_type")}.items()


@pytest.mark.parametrize("kind", ["mistral", "bert"])
def test_an_adapter_of_another_model_is_refused(kind: str, written: Written, tmp_path: Path) -> None:
    base, _ = written("llama")
    other = write_lora(tmp_path / "other", write_base(tmp_path / "b", "llama", hidden_size=48))
    with pytest.raises(FormatError, match="the adapter was made for"):
        prune(open_model(base), adaptc.load(other), Options(ratio=0.3, criterion="magnitude"), out=tmp_path / "out")
    _, foreign = written("bert")
    with pytest.raises(NeedsError, match="base has no parameter"):
        prune(open_model(base), adaptc.load(foreign), Options(ratio=0.3, criterion="magnitude"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_cannot_differ_in_a_smaller_model() -> None:
    with pytest.raises(UsageError, match="one width for all layers"):
        Options(ratio=0.3, keep_first=1)


def test_without_an_adapter_the_base_alone_is_pruned(written: Written, tmp_path: Path) -> None:
    base, _ = written("gemma")
    done = prune(open_model(base), None, Options(ratio=0.3, criterion="magnitude"), out=tmp_path / "out")
    assert done.adapter is None
    assert not (tmp_path / "out" / "adapter").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(tokens()).logits).all())
