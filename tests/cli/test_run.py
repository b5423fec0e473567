"""adaptc run and convert: specs, recipes, and what a dialect cannot say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc as library
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import Sparse
from adaptc.errors import LossError
from adaptc.recipe import read_recipe

RECIPE = """
[[step]]
pass = "truncate"
energy = 0.999
include = ["q_proj"]

[[step]]
pass = "truncate"
size = "9KB"
dtype = "fp16"
"""


def test_spec_and_recipe_and_python_agree(adaptc, adapter):
    Path("recipe.toml").write_text(RECIPE)
    spec = "truncate{include=q_proj,energy=0.999},truncate{size=9000,dtype=fp16}"
    first = adaptc("run", "recipe.toml", adapter, "one", "--json")
    second = adaptc("run", spec, adapter, "two", "--json")
    assert (first.code, second.code) == (0, 0)
    assert same(library.load("one"), library.load("two"))
    assert same(library.run(library.load(adapter), "recipe.toml"), library.load("one"))
    assert str(read_recipe("recipe.toml")) == first.data["spec"] == second.data["spec"]
    assert ",".join(s.spec for s in library.load("one").history) == first.data["spec"]
    assert sum(p.stat().st_size for p in Path("one").iterdir()) <= 9000


def test_report_compares_the_first_input_with_the_last_output(adaptc, adapter):
    data = adaptc("run", "truncate{rank=5},truncate{rank=2}", adapter, "out", "--json").data
    before, after = library.load(adapter).deltas, library.load("out").deltas
    for module in data["modules"]:
        w, k = before[module["name"]].dense(), after[module["name"]].dense()
        assert module["error"] == pytest.approx(float((w - k).norm() / w.norm()), rel=1e-6)
        assert module["rank"] == {"before": 8, "after": 2}


def test_codes_are_written_as_a_container_and_their_notes_say_from_where(adaptc, adapter):
    said = adaptc("run", "truncate{rank=4},quantize{bits=2}", adapter, "out", "--json")
    assert said.data["dialect"]["output"] == "adaptc"
    assert adaptc("verify", "out").code == 0
    first = library.run(library.load(adapter), "truncate{rank=4}")
    own = library.diff(first, library.load("out")).error
    assert f"quantize starts from what ran before it and is {own:.3g} away from that" in said.data["notes"][0]
    plain = adaptc("run", "truncate{rank=4},quantize{bits=2}", adapter, "plain", "--to", "peft", "--json")
    assert plain.data["dialect"]["output"] == "peft"


@pytest.mark.parametrize(("text", "code", "said"), [
    ("[[step]]\nrank = 8", 1, "step 1 has no pass"),
    ("[[step]]\npass = 'truncate'\nrnk = 8", 2, "step 1: truncate has no option rnk"),
    ("[[step]]\npass = 'truncate'\nrank = 'eight'", 2, "truncate option rank is 'eight', expected a whole number"),
    ("[[step]]\npass = 'truncate'\nrank = 8\n[[step]]\npass = 'squash'", 2, "step 2: pass squash is not known"),
    ("[[stop]]\npass = 'truncate'", 1, "stop is not part of a recipe"),
    ("step = 3", 1, "recipe has no [[step]]"), ("", 1, "recipe has no [[step]]"), ("[[step", 1, "not TOML"),
])
def test_bad_recipes(text, code, said, adaptc, adapter):
    Path("recipe.toml").write_text(text)
    result = adaptc("run", "recipe.toml", adapter, "out")
    assert result.code == code
    assert result.err.startswith("adaptc: recipe.toml: ")
    assert said in result.err
    assert not Path("out").exists()


def test_failure_names_what_ran_before(adaptc, adapter):
    said = adaptc("run", "truncate{rank=4},truncate{size=200}", adapter, "out")
    assert said.code == 2
    assert "truncate: size 200 bytes is below" in said.err
    assert "(after truncate{rank=4})" in said.err
    assert not Path("out").exists()


def test_convert_refuses_and_lists_what_is_lost(adaptc, adapter, monkeypatch):
    sparse = Sparse(torch.tensor([1, 5]), torch.ones(2), 1.0, (4, 4))
    held = library.load(adapter)
    mixed = Adapter({**held.deltas, "lm_head.weight": sparse}, held.replaced, Origin("peft", held.origin.config))
    with pytest.raises(LossError):
        library.save(mixed, "lossy")
    monkeypatch.setattr("adaptc.formats.peft.Peft.read", lambda self, source: mixed)
    said = adaptc("convert", adapter, "out", "--to", "peft")
    assert said.code == 1
    assert "cannot say everything" in said.err
    assert "  lost: lm_head.weight: " in said.err
    assert "--allow-loss" in said.err
    assert not Path("out").exists()
    allowed = adaptc("convert", adapter, "out", "--to", "peft", "--allow-loss")
    assert allowed.code == 0
    assert "! lost: lm_head.weight: " in allowed.out
    monkeypatch.undo()


def test_convert_keeps_every_bit(adaptc, adapter):
    said = adaptc("convert", adapter, "copy", "--to", "peft", "--json")
    assert said.code == 0
    assert said.data["losses"] == []
    assert same(library.load("copy"), library.load(adapter))
    assert adaptc("convert", adapter, "copy", "--to", "peft").code == 2


def test_a_recipe_may_begin_with_a_merge(adaptc, make):
    adapter, other = make("adapter"), make("other", seed=5)
    spec = "merge{heads=drop},truncate{rank=2}"
    said = adaptc("run", spec, adapter, other, "both", "--json")
    assert said.code == 0, said.err
    expected = library.run([library.load(adapter), library.load(other)], spec)
    written = library.load("both")
    assert set(written.deltas) == set(expected.deltas)
    for key, delta in expected.deltas.items():
        assert torch.equal(written.deltas[key].b, delta.b)
    said = adaptc("run", "truncate{rank=2}", adapter, other, "neither")
    assert said.code == 2
    assert "2 adapters for passes that take one" in said.err
