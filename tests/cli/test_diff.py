"""adaptc diff: errors against dense algebra, missing modules, carried tensors, the exit code."""

from __future__ import annotations

import pytest
import torch

import adaptc as library
from adaptc.adapter import Adapter, Origin
from adaptc.delta import Dense, LowRank
from adaptc.formats.parts import part_key


def test_errors_match_dense_algebra(adaptc, make):
    make("a"), make("b", seed=1, rank=4)
    data = adaptc("diff", "a", "b", "--json").data
    a, b = ({k: d.dense() for k, d in library.load(p).deltas.items()} for p in "ab")
    for module in data["modules"]:
        key = module["name"]
        assert module["error"] == pytest.approx(float((a[key] - b[key]).norm() / a[key].norm()), rel=1e-9)
    stacked = [torch.cat([x[k].flatten() for k in a]) for x in (a, b)]
    assert data["error"] == pytest.approx(float((stacked[0] - stacked[1]).norm() / stacked[0].norm()), rel=1e-9)


def test_same_adapter_has_no_distance(adaptc, adapter):
    said = adaptc("diff", adapter, adapter, "--json", "--fail-above", 0)
    assert said.code == 0
    assert said.data["error"] == said.data["worst"] == 0
    assert all(m["error"] == 0 for m in said.data["modules"])


def test_fail_above_is_the_exit_code(adaptc, adapter):
    assert adaptc("compress", adapter, "--rank", 3, "-o", "out").code == 0
    error = adaptc("diff", adapter, "out", "--json").data["error"]
    assert adaptc("diff", adapter, "out", "--fail-above", error * 1.01).code == 0
    failed = adaptc("diff", adapter, "out", "--fail-above", error * 0.99)
    assert failed.code == 1
    assert failed.out.rstrip().splitlines()[-1].startswith("failed: ")


def test_missing_modules_count_as_zero_and_are_listed(adaptc, make):
    make("two"), make("one", layers=1)
    said = adaptc("diff", "two", "one", "--json")
    missing = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    assert (said.data["only_a"], said.data["only_b"]) == (missing, [])
    assert {m["name"]: m["error"] for m in said.data["modules"] if m["error"]} == dict.fromkeys(missing, 1.0)
    assert "only in two, counted as zero in the other: 2 modules" in adaptc("diff", "two", "one").out
    back = adaptc("diff", "one", "two", "--json").data
    assert back["only_b"] == missing
    assert [m["error"] for m in back["modules"] if m["name"] in missing] == [None, None]  # infinite: nothing to compare


def test_carried_tensors_are_compared(adaptc, make):
    def retrain(tensors, config):
        tensors["base_model.model.score.weight"] *= 1.5

    make("a"), make("b", edit=retrain), make("c", edit=lambda t, c: t.pop("base_model.model.score.weight"))
    data = adaptc("diff", "a", "b", "--json").data
    assert data["error"] == 0
    assert data["carried"] == [{"name": "score.weight", "error": pytest.approx(0.5), "note": ""}]
    assert adaptc("diff", "a", "b", "--fail-above", 0.4).code == 1
    assert "carried score.weight: carried only by a" in adaptc("diff", "a", "c").out
    assert adaptc("diff", "a", "c", "--fail-above", 0.5).code == 1


def test_scale_rules_compare_by_value(adaptc, make):
    """alpha 16 at rank 8 equals alpha 4 sqrt(2) under rsLoRA: the multiplier is 2 both ways."""
    make("plain"), make("rs", edit=lambda t, c: c.update(use_rslora=True, lora_alpha=2 * 8**0.5))
    assert adaptc("diff", "plain", "rs", "--json").data["error"] < 1e-15
    make("wrong", edit=lambda t, c: c.update(use_rslora=True))
    assert adaptc("diff", "plain", "wrong", "--json").data["error"] == pytest.approx(8**0.5 - 1)


def test_parts_of_a_fused_parameter_are_compared_with_the_whole():
    random = torch.Generator().manual_seed(0)
    name = "attn.qkv.weight"
    pairs = {at: (torch.randn(2, 5, generator=random), torch.randn(4, 2, generator=random)) for at in (0, 8)}
    parts = {part_key(name, at, at + 4): LowRank(*pair, None, 1.0 + at, (4, 5)) for at, pair in pairs.items()}
    split = Adapter(parts, {}, Origin("x", layout=dict.fromkeys(parts, "rows:12")))
    dense = torch.zeros(12, 5, dtype=torch.float64)
    for part, at in zip(parts.values(), pairs, strict=True):
        dense[at : at + 4] = part.dense()
    whole = Adapter({name: Dense(dense, 1.0, (12, 5))}, {}, Origin("x"))
    for x, y in ((split, whole), (whole, split)):
        found = library.diff(x, y)
        assert [g.key for g in found.modules] == [name]
        assert found.error < 1e-6
    assert library.diff(split, split).error == 0
    assert [g.key for g in library.diff(split, split).modules] == list(parts)


def test_nothing_in_common_is_refused(adaptc, make):
    def rename(tensors, config):
        for key in [k for k in tensors if "layers" in k]:
            tensors[key.replace("layers", "h")] = tensors.pop(key)

    make("a"), make("b", edit=rename)
    said = adaptc("diff", "a", "b")
    assert said.code == 1
    assert "no module is in both" in said.err
