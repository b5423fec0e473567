"""GGUF adapters: what gguf's own reader finds in them, names, row order, scales, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import noise, put, put_config

import adaptc
from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, NeedsError, UnsupportedError
from adaptc.formats.gguf import Gguf
from adaptc.formats.gguf_arch import FAMILIES, Target, gguf_name, parameter_name, target_of
from adaptc.formats.source import open_source

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
LLAMA = Target("llama", 4, 2, False)
Q, K, DOWN = (f"model.layers.3.{m}.weight" for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
SHAPES = {Q: (64, 256), K: (32, 256), DOWN: (256, 512)}


def lora(rank: int = 4, scale: float = 2.0, shapes: dict[str, tuple[int, int]] = SHAPES) -> Adapter:
    deltas = {k: LowRank(noise(rank, n), noise(m, rank, seed=1), None, scale, (m, n)) for k, (m, n) in shapes.items()}
    return Adapter(deltas, {}, Origin("peft", {"peft_type": "LORA"}, base_model="some/llama"))


def write(adapter: Adapter, at: Path, fmt: Gguf) -> Path:
    made = fmt.contents(adapter)[""]
    assert isinstance(made, bytes)
    at.write_bytes(made)
    return at


def theirs(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Tensors and facts as gguf's reader has them."""
    held = gguf.GGUFReader(str(path))
    facts = {k: f.contents() for k, f in held.fields.items() if not k.startswith("GGUF.")}
    return {t.name: np.array(t.data) for t in held.tensors}, facts


def permuted(w: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's converter, head by head: row i of the first half, then row i of the second."""
    out = []
    for head in w.reshape(heads, -1, w.shape[1]):
        half = len(head) // 2
        for i in range(half):
            out += [head[i], head[half + i]]
    return torch.stack(out)


def test_what_gguf_reads(tmp_path: Path) -> None:
    adapter = lora()
    held, facts = theirs(write(adapter, tmp_path / "a.gguf", Gguf(LLAMA, "f32", "f32")))
    assert facts["general.type"] == "adapter"
    assert (facts["general.architecture"], facts["adapter.type"], facts["adapter.lora.alpha"]) == ("llama", "lora", 0.0)
    assert facts["general.base_model.0.name"] == "some/llama"
    for key, name, heads in ((Q, "blk.3.attn_q", 4), (K, "blk.3.attn_k", 2), (DOWN, "blk.3.ffn_down", 0)):
        a, b = (torch.from_numpy(held[f"{name}.weight.lora_{x}"]).double() for x in "ab")
        dense = adapter.deltas[key].dense()
        torch.testing.assert_close(b @ a, permuted(dense, heads) if heads else dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind_a", "kind_b"), [("f32", "f32"), ("f16", "f16"), ("bf16", "f32"), ("q8_0", "q8_0"),
                                                ("q4_0", "q4_0"), ("tq1_0", "tq2_0"), ("q1_0", "q4_0")])
def test_reading_back_is_exact_and_writing_again_too(kind_a: str, kind_b: str, tmp_path: Path) -> None:
    path = write(lora(), tmp_path / "a.gguf", Gguf(LLAMA, kind_a, kind_b))
    held, _ = theirs(path)
    back = adaptc.load(path)  # heads are in the file
    assert list(back.deltas) == list(SHAPES)
    assert back.origin.config["types"][DOWN] == [kind_a, kind_b]
    if (kind_a, kind_b) == ("f32", "f32"):
        assert torch.equal(back.deltas[DOWN].a, torch.from_numpy(held["blk.3.ffn_down.weight.lora_a"]))
    again = adaptc.save(back, tmp_path / "b.gguf")
    assert again.stat().st_size == path.stat().st_size
    twice = adaptc.load(again)
    for key, delta in back.deltas.items():
        assert torch.equal(twice.deltas[key].a, delta.a)
        assert torch.equal(twice.deltas[key].b, delta.b)
    assert Gguf().size(back) == path.stat().st_size


def test_names_are_those_of_gguf_and_come_back() -> None:
    for arch, family in FAMILIES.items():
        known = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), 4)
        for leaf, module in {f"blk.2.{k}": f"{family.layers}.2.{v}" for k, v in family.modules.items()}.items():
            theirs = known.get_name(module) or known.get_name(module.removeprefix("bert."))
            assert theirs == leaf, (arch, module)
            assert gguf_name(f"{module}.weight", family) == f"{leaf}.weight"
            assert parameter_name(f"{leaf}.weight", family) == f"{module}.weight"
        for leaf, module in family.outside.items():
            theirs = known.get_name(module) or known.get_name(module.removeprefix("bert."))
            assert theirs == leaf, (arch, module)


def test_names_with_and_without_wrappers(tmp_path: Path) -> None:
    shapes = {"layers.0.mlp.up_proj.weight": (32, 64)}
    back = adaptc.load(write(lora(shapes=shapes), tmp_path / "a.gguf", Gguf(LLAMA)))
    assert list(back.deltas) == list(shapes)
    tower = {"vision_tower.layers.0.mlp.up_proj.weight": (32, 64)}
    assert "llama.cpp runs no LoRA" in Gguf(LLAMA).cannot(lora(shapes=tower))[0]


def test_rs_lora_and_patterns_come_through_peft(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{k.removesuffix('.weight')}.lora_{x}.weight":
               noise(r, n) if x == "A" else noise(m, r, seed=2)
               for (k, (m, n)), r in zip(SHAPES.items(), (4, 4, 2), strict=True) for x in "AB"}
    put(put_config(tmp_path / "in", {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True,
                                     "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}})
        / "adapter_model.safetensors", tensors)
    adapter = adaptc.load(tmp_path / "in")
    back = adaptc.load(write(adapter, tmp_path / "a.gguf", Gguf(LLAMA, "f32", "f32")))
    for key, scale in ((Q, 3 / 2), (K, 6 / 2), (DOWN, 6 / 2**0.5)):
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        want = scale * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        torch.testing.assert_close(back.deltas[key].dense(), want, rtol=1e-5, atol=1e-5)


def foreign(at: Path, alpha: float, names: tuple[str, ...] = ("blk.0.attn_v", "blk.0.attn_q")) -> Path:
    """An adapter as llama.cpp's converter writes it: alpha in the file, no head counts."""
    out = gguf.GGUFWriter(str(at), "llama")
    out.add_type("adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", alpha)
    for name in names:
        out.add_tensor(f"{name}.weight.lora_a", noise(4, 64).numpy())
        out.add_tensor(f"{name}.weight.lora_b", noise(32, 4, seed=1).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return at


def test_files_of_the_converter(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.gguf", 8.0)
    raw = adaptc.load(path)
    assert list(raw.deltas) == ["blk.0.attn_v.weight", "blk.0.attn_q.weight"]
    assert "number of heads is not in the file" in raw.origin.notes[0]
    dense = noise(32, 4, seed=1).double() @ noise(4, 64).double() * 2
    torch.testing.assert_close(raw.deltas["blk.0.attn_q.weight"].dense(), dense)
    before, facts = theirs(path)
    after, kept = theirs(adaptc.save(raw, tmp_path / "b.gguf"))
    assert kept["adapter.lora.alpha"] == facts["adapter.lora.alpha"] == 8.0
    assert all(np.array_equal(before[k], after[k]) for k in before)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2}))
    named = adaptc.load(path)
    assert list(named.deltas) == [f"model.layers.0.self_attn.{m}_proj.weight" for m in "vq"]
    torch.testing.assert_close(permuted(named.deltas["model.layers.0.self_attn.q_proj.weight"].dense(), 2), dense)
    small = adaptc.compress(named, rank=2)
    assert theirs(adaptc.save(small, tmp_path / "c.gguf"))[1]["adapter.lora.alpha"] == 0.0


def test_embedding_and_head(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (48, 64), "lm_head.weight": (48, 64)}
    adapter = lora(shapes=shapes)
    path = write(adapter, tmp_path / "a.gguf", Gguf(LLAMA, "f32", "f32"))
    held, _ = theirs(path)
    assert held["token_embd.weight.lora_a"].shape == (48, 4)  # rows are looked up
    assert held["token_embd.weight.lora_b"].shape == (64, 4)
    back = adaptc.load(path)
    for key in shapes:
        torch.testing.assert_close(back.deltas[key].dense(), adapter.deltas[key].dense(), rtol=1e-5, atol=1e-5)
    tied = Gguf(replace(LLAMA, tied=True)).cannot(adapter)
    assert "aborts" in tied[0]
    assert "its embedding" in tied[1]


def test_widths_that_are_no_whole_blocks(tmp_path: Path) -> None:
    shapes = {DOWN: (64, 192), K: (32, 80)}
    back = adaptc.load(write(lora(shapes=shapes), tmp_path / "a.gguf", Gguf(LLAMA, "q1_0", "q4_0")))
    assert back.origin.config["types"] == {DOWN: ["q4_0", "q4_0"], K: ["f16", "q4_0"]}


def test_losses_are_listed_and_the_rest_written(tmp_path: Path) -> None:
    dora = NeedsBase("dora", {"magnitude": torch.ones(32)}, {"axis": 0}, (32, 256), lora().deltas[K])
    adapter = lora()
    adapter = Adapter({**adapter.deltas, K: dora, "model.layers.0.mlp.up_proj.weight": Dense(noise(8, 8), 1.0, (8, 8))},
                      {"lm_head.weight": noise(4, 4), "model.embed_tokens.weight": Rows((1,), noise(1, 8)),
                       "model.norm.weight": noise(8)}, adapter.origin)
    lost = Gguf(LLAMA).cannot(adapter)
    assert len(lost) == 5
    assert "resolve" in next(x for x in lost if x.startswith(K))
    assert any("a full tensor" in x and x.startswith("model.norm") for x in lost)
    path = write(adapter, tmp_path / "a.gguf", Gguf(LLAMA))
    assert list(adaptc.load(path).deltas) == [Q, DOWN]


def test_unknown_base_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match=r"some/llama.* is not known"):
        adaptc.save(lora(), tmp_path / "a.gguf", dialect="gguf")
    with pytest.raises(NeedsError, match="number is not known"):
        Gguf(Target("llama")).contents(lora())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    with pytest.raises(UnsupportedError, match="rwkv has no llama"):
        target_of(tmp_path)
    with pytest.raises(FormatError, match="33 rows are not 4 heads"):
        Gguf(LLAMA).contents(lora(shapes={Q: (33, 64)}))


def test_base_folder_of_the_adapter_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "num_attention_heads": 4,
                                                      "num_key_value_heads": 2}))
    adapter = replace(lora(), origin=replace(lora().origin, base_model=str(tmp_path)))
    assert adaptc.load(adaptc.save(adapter, tmp_path / "a.gguf", dialect="gguf")).origin.config["facts"][
        "general.architecture"] == "llama"


@pytest.mark.parametrize(("harm", "says"), [
    (lambda d: d[:-100], "truncated"), (lambda d: d[:40], "damaged GGUF header"),
    (lambda d: d.replace(b"adapter", b"adoptir", 1), "no LoRA adapter"),
    (lambda d: d.replace(b"lora_b", b"lora_c", 1), "no lora_a or lora_b"),
    (lambda d: d.replace(struct.pack("<Q", 3) + b"blk", struct.pack("<Q", 2**60) + b"blk", 1), "")])
def test_damage(harm: Any, says: str, tmp_path: Path) -> None:
    data = write(lora(), tmp_path / "a.gguf", Gguf(LLAMA)).read_bytes()
    (tmp_path / "b.gguf").write_bytes(harm(data))
    if harm(data) == data:
        return
    with pytest.raises((FormatError, UnsupportedError), match=says):
        adaptc.load(tmp_path / "b.gguf")


def test_sizes_of_a_real_rank_32(tmp_path: Path) -> None:
    """A layer of 2048 wide Llama with a rank of 32: one bit for A and four for B is a fifth of F16."""
    shapes = {f"model.layers.0.{m}.weight": s for m, s in (("self_attn.q_proj", (2048, 2048)),
                                                             ("self_attn.v_proj", (512, 2048)),
                                                             ("mlp.down_proj", (2048, 5632)))}
    meta = lora(32, shapes=shapes).map(lambda _, d: replace(d, a=d.a.to("meta"), b=d.b.to("meta")))
    target = Target("llama", 32, 8)
    sizes = {t: Gguf(target, *t.split()).size(meta) for t in ("f16 f16", "q8_0 q8_0", "q4_0 q4_0", "q1_0 q4_0")}
    assert sizes["f16 f16"] > 2.5 * sizes["q1_0 q4_0"]
    assert sizes["f16 f16"] / sizes["q1_0 q4_0"] > 5
    assert sizes["f16 f16"] / sizes["q4_0 q4_0"] > 3.5


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is a GGUF model"):
        Gguf().read(open_source(_model(tmp_path / "m.gguf")))
    with pytest.raises(LossError, match="MLX"):
        adaptc.save(lora(shapes=SHAPES).map(lambda _, d: Dense(d.dense(), 1.0, d.shape)), tmp_path / "x", dialect="mlx")


def _model(at: Path) -> Path:
    out = gguf.GGUFWriter(str(at), "llama")
    out.add_tensor("output.weight", np.zeros((2, 32), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return at
