"""Templates expand to exactly the names they were made from, and stay small."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptc.errors import FormatError
from adaptc.formats.portable_names import pack_names, unpack_names

LLAMA = [f"model.layers.{i}.{m}.weight" for i in range(32) for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj")]


def test_a_llama_takes_two_templates() -> None:
    templates = pack_names(LLAMA)
    assert sorted(templates) == ["model.layers.{0-31}.mlp.{gate_proj,up_proj,down_proj}.weight",
                                 "model.layers.{0-31}.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight"]
    assert sorted(unpack_names(templates)) == sorted(LLAMA)


def test_irregular_sets_still_come_back() -> None:
    odd = ["lm_head.weight", "unet:3.weight", "a,b.weight", "a.{x}.weight", "a\\.b", "0-3.weight", "1-4.weight"]
    names = [*LLAMA[:10], *odd]
    assert sorted(unpack_names(pack_names(names))) == sorted(names)


PART = st.text(alphabet="ab01-,{}\\:_ é", max_size=4)


@given(st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), unique=True, max_size=20))
def test_any_names_come_back(names: list[str]) -> None:
    assert sorted(unpack_names(pack_names(names))) == sorted(names)


@pytest.mark.parametrize("bad", ["a.{0-99999999}.b", "{0-999}{0-999}{0-999}", "a.{5-3}", "a.{b", "a}.b"])
def test_hostile_templates_are_refused(bad: str) -> None:
    with pytest.raises(FormatError):
        unpack_names([bad])


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(FormatError, match="twice"):
        unpack_names(["a.{b,c}", "a.c"])
