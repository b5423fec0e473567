from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS

from adaptc.errors import FormatError, UnsupportedError
from adaptc.prune.groups import FAMILIES, KNOWN, architecture, couplings
from adaptc.prune.loraprune import open_model

Written = Callable[[str], tuple[Path, Path]]
CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 6}


def shapes(**changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    plain = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
             "self_attn.o_proj": (8, 8), "mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
    return {f"model.layers.0.{k}.weight": changes.get(k.split(".")[1], v) for k, v in plain.items()}


def test_every_known_family_is_tried_on_a_real_model() -> None:
    assert set(CONFIGS) == set(KNOWN)
    assert len(KNOWN) == sum(len(f.models) for f in FAMILIES)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "bert"])
def test_units_of_a_group_are_disjoint_and_cover_it(kind: str, written: Written) -> None:
    model = open_model(written(kind)[0])
    for group in model.groups:
        entries: dict[tuple[str, int], list[int]] = {}
        for part in group.parts:
            for unit in range(group.units):
                entries.setdefault((part.key, part.axis), []).extend(part.entries(torch.tensor([unit])).tolist())
        for (key, axis), found in entries.items():
            assert sorted(found) == list(range(model.shapes[key][axis]))


def test_a_key_value_head_goes_with_its_own_queries() -> None:
    group = couplings(architecture(CONFIG, shapes()), shapes(), "kv")[0]
    q, k, v, o = group.parts
    assert (group.units, group.blocks) == (2, 1)
    assert q.entries(torch.tensor([1])).tolist() == o.entries(torch.tensor([1])).tolist() == [4, 5, 6, 7]
    assert k.entries(torch.tensor([1])).tolist() == v.entries(torch.tensor([1])).tolist() == [2, 3]


def test_single_queries_are_counted_within_their_key_value_head() -> None:
    group = couplings(architecture(CONFIG, shapes()), shapes(), "query")[0]
    assert (group.units, group.blocks) == (4, 2)
    assert [p.key.split(".")[-2] for p in group.parts] == ["q_proj", "o_proj"]


def test_one_key_value_head_is_shared_by_single_queries() -> None:
    config, few = {**CONFIG, "num_key_value_heads": 1}, shapes(k_proj=(2, 8), v_proj=(2, 8))
    group = couplings(architecture(config, few), few)[0]
    assert (group.units, group.blocks) == (4, 1)


def test_missing_words_are_read_off_the_shapes() -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "intermediate_size")}
    arch = architecture(config, shapes())
    assert (arch.kv, arch.head_dim, arch.ffn, arch.queries) == (2, 2, 6, 2)


def test_biases_go_with_their_rows() -> None:
    some = {**shapes(), "model.layers.0.mlp.up_proj.bias": (6,), "model.layers.0.mlp.down_proj.bias": (8,)}
    ffn = couplings(architecture(CONFIG, some), some)[1]
    assert "model.layers.0.mlp.up_proj.bias" in {p.key for p in ffn.parts}
    assert "model.layers.0.mlp.down_proj.bias" not in {p.key for p in ffn.parts}
    assert {p.key for p in ffn.weights} == {p.key for p in ffn.parts if p.key.endswith(".weight")}


def test_unknown_models_are_told_which_are_known() -> None:
    with pytest.raises(UnsupportedError, match=r"model_type mamba is not known .*llama.*qwen3"):
        architecture({"model_type": "mamba"}, {})


def test_quantised_weights_are_not_sliced() -> None:
    with pytest.raises(UnsupportedError, match="stored quantised"):
        architecture({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}, shapes())


@pytest.mark.parametrize(("changes", "message"), [
    ({"gate_proj": (5, 8)}, "base has 5 rows, its config promises 6"),
    ({"v_proj": (6, 8)}, "base has 6 rows, its config promises 4"),
    ({"o_proj": (8, 9)}, "base has 9 columns"),
])
def test_shapes_that_contradict_the_config_are_refused(changes: dict[str, tuple[int, int]], message: str) -> None:
    some = shapes(**changes)
    arch = architecture({**CONFIG, "head_dim": 2, "num_key_value_heads": 2}, {**some, **{
        k: v for k, v in shapes().items() if "o_proj" in k}})
    with pytest.raises(FormatError, match=message):
        couplings(arch, some)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(FormatError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: base has no such matrix"):
        couplings(architecture({**CONFIG, "num_hidden_layers": 2}, shapes()), shapes())


@pytest.mark.parametrize("value", [0, None, "4", True])
def test_sizes_are_positive_whole_numbers(value: object) -> None:
    with pytest.raises(FormatError, match="num_attention_heads"):
        architecture({**CONFIG, "num_attention_heads": value}, shapes())
