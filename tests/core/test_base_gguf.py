"""GGUF base weights: names, order, orientation and offsets undone, against transformers and the models themselves."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import hf_model, write_gguf

from adaptc.base import Base
from adaptc.base_gguf import MODULES
from adaptc.errors import AdaptcError, FormatError, NeedsError, UnsupportedError
from adaptc.gguf_header import read_gguf_header

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", MODULES)
def test_parameters_are_the_models(family: str, tmp_path: Path) -> None:
    model = hf_model(family)
    written, state = write_gguf(tmp_path / "m.gguf", family, model), model.state_dict()
    base = Base(tmp_path / "m.gguf")
    assert set(base) == written
    assert set(state) - written <= {"lm_head.weight", "pooler.dense.weight", "pooler.dense.bias"}
    for name in written:
        rounded = state[name] + 1 - 1 if family.startswith("gemma") and name.endswith("norm.weight") else state[name]
        assert torch.equal(base[name], rounded), name


@pytest.mark.parametrize(("family", "kind"), [
    ("llama", "Q8_0"), ("llama", "BF16"), ("qwen2", "Q4_0"), ("qwen3", "F16"), ("gemma2", "Q5_1"), ("gemma3", "Q8_0"),
    ("phi3", "Q4_1"), ("gpt2", "Q8_0"),
])
def test_transformers_reads_the_same(family: str, kind: str, tmp_path: Path) -> None:
    model = hf_model(family)
    write_gguf(tmp_path / "m.gguf", family, model, kind)
    base = Base(tmp_path)  # the only model in its folder
    theirs: Any = type(model).from_pretrained(tmp_path, gguf_file="m.gguf", config=model.config)
    state = theirs.state_dict()
    for name in base:
        assert torch.equal(base[name], state[name]), name


def test_facts_of_the_header_and_orientation(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gpt2", hf_model("gpt2"))
    base = Base(tmp_path / "m.gguf")
    assert {k: base.config[k] for k in ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")} == {
        "model_type": "gpt2", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    assert base["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert base.weight("transformer.h.0.mlp.c_fc.weight", (128, 32)).shape == (128, 32)
    assert "tokenizer.ggml.tokens" not in read_gguf_header(tmp_path / "m.gguf").facts
    assert "general.name" in read_gguf_header(tmp_path / "m.gguf").facts


def test_split_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", "llama", hf_model("llama"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=11)
    source = gguf.GGUFReader(tmp_path / "whole.gguf")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{key}", source.fields[f"llama.{key}"].contents())
    for t in source.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 1
    whole, split = Base(tmp_path / "whole.gguf"), Base(parts[0])
    assert set(whole) == set(split)
    assert all(torch.equal(whole[k], split[k]) for k in whole)
    parts[1].unlink()
    with pytest.raises(NeedsError, match=f"is one of {len(parts)} parts, {parts[1].name} is missing"):
        Base(parts[0])
    with pytest.raises(NeedsError, match="holds 2 GGUF models"):
        Base(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", hf_model("llama"))
    good = path.read_bytes()
    for cut in (3, 23, 40, 400, 2000):
        path.write_bytes(good[:cut])
        with pytest.raises(FormatError):
            Base(path)
    path.write_bytes(good[:-40_000])
    with pytest.raises(FormatError, match="truncated"):
        {name: Base(path)[name] for name in Base(path)}
    for version, at in ((1, 4), (1 << 24, 4)):
        path.write_bytes(good[:at] + struct.pack("<I", version) + good[8:])
        with pytest.raises(FormatError, match=f"GGUF version {version}"):
            Base(path)
    path.write_bytes(good[:16] + struct.pack("<Q", 1 << 60) + good[24:])
    with pytest.raises(FormatError, match="damaged GGUF header"):
        Base(path)


def test_any_damage_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", hf_model("llama"))
    good, chance = path.read_bytes(), random.Random(5)
    body = len(good) - 4 * sum(t.numel() for t in Base(path).values())
    told = 0
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 1, 4))):
            at = chance.randrange(body)
            bad[at] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        path.write_bytes(bytes(bad))
        try:
            base = Base(path)
            for name in base:
                base[name]
        except AdaptcError:
            told += 1
    assert told > 20  # most damage is in names and token texts, which nobody can tell from others


def test_unknown_families(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture mamba"):
        Base(tmp_path / "m.gguf")
