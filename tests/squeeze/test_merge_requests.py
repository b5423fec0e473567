"""The Merge join refuses what does not go together, and says what it did with the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merging import KEY, adapter, dense, inputs, lora

from adaptc.adapter import Adapter
from adaptc.delta import LowRank
from adaptc.errors import AdaptcError, FormatError, UnsupportedError, UsageError
from adaptc.squeeze.merge import Merge
from adaptc.squeeze.method import MERGES

METHODS = MERGES.ids()


def test_a_missing_parameter_counts_as_zero_and_is_reported() -> None:
    other = "model.layers.1.self_attn.q_proj.weight"
    a = adapter({KEY: lora(20, 20, 3, 1), other: lora(20, 20, 3, 2)})
    b = adapter({KEY: lora(20, 20, 3, 3)})
    for method in METHODS:
        out = Merge(method=method, names=("a", "b"))([a, b])
        assert out.notes == ("b lacks 1 of 2 parameters, they count as zero",)
        assert out.rows[1].note == "missing from b, counted as zero"
    assert np.allclose(dense(Merge()([a, b]).adapter, other), dense(a, other) / 2, rtol=0, atol=1e-6)


CLASHES = {
    "shape": ({KEY: (20, 20)}, {KEY: (24, 20)}, rf"{KEY}: shape 20x20 in a, 24x20 in b"),
    "disjoint": ({"x.q.weight": (8, 8)}, {"y.q.weight": (8, 8)},
                 "no two inputs share a parameter: x.q.weight in a, y.q"),
    "fused": ({"h.attn.qkv_proj.weight": (24, 8)}, {"h.attn.q_proj.weight": (8, 8)},
              r"h.attn.qkv_proj.weight in a is fused, b has it split \(h.attn.q_proj.weight\)"),
    "split": ({"h.attn.q_proj.weight": (8, 8), "h.mlp.weight": (8, 8)},
              {"h.attn.qkv_proj.weight": (24, 8), "h.mlp.weight": (8, 8)},
              "h.attn.qkv_proj.weight in b is fused, a has it"),
    "in_proj": ({"attn.in_proj_weight": (24, 8)}, {"attn.q_proj.weight": (8, 8)}, "attn.in_proj_weight in a is fused"),
    "gate_up": ({"m.gate_up_proj.weight": (24, 8)}, {"m.up_proj.weight": (8, 8)},
                "m.gate_up_proj.weight in a is fused"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_the_first_clash_is_named(case: str) -> None:
    one, two, text = CLASHES[case]
    a, b = (adapter({k: lora(*s, 2, i) for i, (k, s) in enumerate(d.items())}) for d in (one, two))
    with pytest.raises(FormatError, match=text):
        Merge(names=("a", "b"))([a, b])


@pytest.mark.parametrize(("first", "second", "alike"), [
    ("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B/", True),
    ("mlx-community/Qwen2.5-0.5B-Instruct-4bit", "/Users/x/Qwen2.5-0.5B-Instruct", True),
    ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b", True),
    ("/c/models--org--Model-1B/snapshots/0a1b2c", "org/model-1b", True),
    ("org/model-7b", "org/model-8b", False), ("roberta-base", "roberta-large", False), (None, "anything", True),
])
def test_base_models(first: str | None, second: str | None, alike: bool) -> None:
    pair = [adapter(lora(8, 8, 2, i), base) for i, base in enumerate((first, second))]
    if alike:
        assert Merge()(pair).adapter.origin.base_model == (first or second)
        return
    with pytest.raises(FormatError, match=f"base models differ: {first} in input 1, {second} in input 2"):
        Merge()(pair)
    Merge(any_base=True)(pair)


@pytest.mark.parametrize(("options", "text"), [
    ({"rank": 0}, "rank is 0"), ({"rank": 2.5}, "rank is 2.5"), ({"method": "ties", "density": 0.0}, "density is 0.0"),
    ({"method": "ties", "density": 1.5}, "density is 1.5"), ({"weights": (1.0,)}, "1 weight for 2 adapters"),
    ({"weights": (1.0, float("nan"))}, "weight nan"), ({"weights": (0.0, 0.0)}, "every weight is 0"),
    ({"density": 0.5}, "method exact has no density"), ({"gauge": "raw"}, "method exact has no gauge"),
    ({"method": "lego", "gauge": "wild"}, "gauge is wild, must be one of balanced, raw"),
    ({"method": "fedavg", "weights": (1.0, -1.0)}, "weight -1.0 makes no sense for fedavg"),
    ({"rank": 4, "size": 4000}, "rank and size exclude each other"), ({"size": 0}, "size is 0 bytes"),
    ({"scale": 0.0}, "scale is 0.0"), ({"method": "legoo"}, "merge method legoo is not known"),
    ({"names": ("a",)}, "1 name for 2 adapters"), ({"dtype": "int8"}, "dtype is int8"),
    ({"heads": "last"}, "heads is last, must be first, drop, or an input"),
])
def test_senseless_requests_are_usage_errors(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Merge(**options)(inputs(8, 8, (2, 2)))  # type: ignore[arg-type]


def test_one_adapter_is_not_enough() -> None:
    with pytest.raises(UsageError, match="two adapters or more, got 1"):
        Merge()(inputs(8, 8, (2,)))


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    bad = adapter(LowRank(torch.full((2, 8), torch.nan), torch.ones(8, 2), None, 1.0, (8, 8)))
    for method in METHODS:
        with pytest.raises(AdaptcError, match=f"{KEY}: .*not finite"):
            Merge(method=method)([inputs(8, 8, (2,))[0], bad])


# heads


def headed(seed: int, **heads: torch.Tensor) -> Adapter:
    return adapter(lora(8, 8, 2, seed), replaced={f"{k}.weight": v for k, v in heads.items()})


def test_heads_that_differ_stop_the_merge_until_told_which() -> None:
    norm, one, two = torch.ones(3), torch.zeros(2, 3), torch.ones(6, 3)
    a, b = headed(1, norm=norm, score=one), headed(2, norm=norm.clone(), score=two, pre=one)
    with pytest.raises(UnsupportedError, match=r"score\.weight differs between a and b") as caught:
        Merge(names=("a", "b"))([a, b])
    assert "--heads first, drop, or one of a, b" in (caught.value.hint or "")
    for heads, shape in (("first", (2, 3)), ("b", (6, 3)), ("drop", None)):
        out = Merge(names=("a", "b"), heads=heads)([a, b])
        kept = out.adapter.replaced
        assert set(kept) == {"norm.weight", "pre.weight"} | ({"score.weight"} if shape else set())
        assert shape is None or kept["score.weight"].shape == shape  # type: ignore[union-attr]
        assert any("score" in n for n in out.notes)
        assert any("pre.weight kept, only b has it" in n for n in out.notes)


def test_dropping_a_head_drops_its_module_whole() -> None:
    zero = torch.zeros(2)
    a, b = (adapter(lora(8, 8, 2, s), replaced={"score.weight": torch.full((2, 8), float(s)), "score.bias": zero,
                                                "norm.weight": zero}) for s in (1, 2))
    assert set(Merge(heads="drop")([a, b]).adapter.replaced) == {"norm.weight"}
