from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts import assert_verbatim, close, dense, put, read, round_trip, t
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, UnsupportedError
from adaptc.formats import size_of
from adaptc.tensorfile import TensorFile

META = {"unet": '["GEGLU", "CrossAttention"]', "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>",
        **{f"unet:{i}:rank": "4" for i in range(12)}, "text_encoder:0:rank": "2"}


def whole() -> dict[str, Tensor]:
    out = {"<s1>": t(20), "text_encoder:0:up": t(9, 2), "text_encoder:0:down": t(2, 9)}
    for i in range(12):
        kernel = (3, 3) if i == 5 else ()
        out |= {f"unet:{i}:up": t(12, 4, *(1 for _ in kernel), seed=i), f"unet:{i}:down": t(4, 20, *kernel, seed=i)}
    return out


def test_an_untouched_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = put(tmp_path / "in.safetensors", whole(), META)
    a = adaptc.load(source)
    assert list(a.deltas) == ["text_encoder:0.weight", *(f"unet:{i}.weight" for i in range(12))]
    assert close(dense(a, "unet:3.weight"), t(12, 4, seed=3).double() @ t(4, 20, seed=3).double())
    assert a.deltas["unet:5.weight"].shape == (12, 20, 3, 3)
    assert torch.equal(a.extra["<s1>"], t(20))
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))


def test_compression_updates_the_ranks(tmp_path: Path) -> None:
    b = adaptc.compress(read(tmp_path, whole(), META), rank=3)
    out = adaptc.save(b, tmp_path / "out.safetensors")
    held = TensorFile(out)
    assert (held.metadata["unet:5:rank"], held.metadata["text_encoder:0:rank"]) == ("3", "2")
    assert held.metadata["unet"] == META["unet"]
    assert held["unet:5:down"].shape == (3, 20, 3, 3)
    assert torch.equal(held["<s1>"], t(20))
    assert same(b, adaptc.load(out))


def test_every_number_is_written_even_where_nothing_is_left(tmp_path: Path) -> None:
    a = read(tmp_path, whole(), META)
    b = a.with_deltas({k: d for k, d in a.deltas.items() if k not in ("unet:3.weight", "unet:5.weight")})
    out = adaptc.save(b, tmp_path / "out.safetensors")
    assert out.stat().st_size == size_of(b)
    c = adaptc.load(out)
    assert list(c.deltas) == list(a.deltas)
    for key in a.deltas:
        if key not in b.deltas:
            assert float(dense(c, key).norm()) == 0.0
            assert c.deltas[key].shape == a.deltas[key].shape


@pytest.mark.parametrize(("file", "model", "count", "classes"), [
    ("lora_weight.pt", "unet", 3, ["CrossAttention", "Attention", "GEGLU"]),
    ("lora_weight.pt", "unet", 128, ["CrossAttention", "Attention"]),
    ("lora_weight.text_encoder.pt", "text_encoder", 3, ["CLIPAttention"])])
def test_a_flat_list_becomes_numbered_pairs(
        tmp_path: Path, file: str, model: str, count: int, classes: list[str]) -> None:
    held = [torch.nn.Parameter(x) for i in range(count) for x in (t(12, 2, seed=i), t(2, 20, seed=i))]
    torch.save(held, tmp_path / file)
    a = adaptc.load(tmp_path / file)
    assert list(a.deltas) == [f"{model}:{i}.weight" for i in range(count)]
    assert close(dense(a, f"{model}:2.weight"), t(12, 2, seed=2).double() @ t(2, 20, seed=2).double())
    out = TensorFile(adaptc.save(a, tmp_path / "out.safetensors"))
    assert json.loads(out.metadata[model]) == classes
    assert out.metadata[f"{model}:1:rank"] == "2"
    assert torch.equal(out[f"{model}:1:up"], t(12, 2, seed=1))
    assert torch.equal(out[f"{model}:1:down"], t(2, 20, seed=1))
    b = adaptc.compress(a, rank=1)
    assert same(b, adaptc.load(adaptc.save(b, tmp_path / "r1.safetensors")))


def test_a_scale_is_multiplied_into_up(tmp_path: Path) -> None:
    a = Adapter({"unet:0.weight": LowRank(t(2, 6), t(5, 2), None, 0.3, (5, 6))}, {}, Origin("peft"))
    back = round_trip(a, tmp_path, "cloneofsimo")
    assert close(dense(back, "unet:0.weight"), dense(a, "unet:0.weight"), 1e-7)
    assert same(back, round_trip(back, tmp_path / "more", "peft", "cloneofsimo"))


def test_names_magnitudes_and_replacements_are_refused(tmp_path: Path) -> None:
    one = LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6))
    a = Adapter({"unet.x.weight": one, "unet:0.weight": NeedsBase("dora", {"magnitude": t(5)}, {}, (5, 6), one)},
                {"h.weight": t(2)}, Origin("peft"), (), {"<s1>": t(3)})
    with pytest.raises(LossError) as caught:
        adaptc.save(a, tmp_path / "x.safetensors", dialect="cloneofsimo")
    assert caught.value.losses == (
        "unet.x.weight: has a name, and only the base model tells its number", "unet:0.weight: dora has no key",
        "1 replaced tensors, first h.weight", "1 carried tensors, first <s1>")


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"unet:3:up": None}, FormatError, "unet:3: down has no up, half an adapter"),
    ({"unet:3:up": t(12, 3)}, FormatError, "unet:3: up has rank 3, down has rank 4"),
    ({"unet:3:up": t(12, 2), "unet:3:down": t(2, 20)}, FormatError, "unet:3: metadata says rank 4, down has rank 2"),
    ({"unet:3:up": t(0, 4)}, FormatError, r"unet:3.up: shape \(0, 4\) holds no factor"),
    ({"unet:5:up": t(12, 4, 3, 3)}, FormatError, "its kernel must be 1"),
    ({"other": t(3)}, UnsupportedError, "other: not a known cloneofsimo tensor"),
])
def test_damage_is_one_clause(
        tmp_path: Path, change: dict[str, Tensor | None], error: type[Exception], says: str) -> None:
    tensors = {k: v for k, v in {**whole(), **change}.items() if v is not None}
    with pytest.raises(error, match=says):
        read(tmp_path, tensors, META)


def test_an_odd_list_is_half_a_pair(tmp_path: Path) -> None:
    torch.save([t(4, 2), t(2, 4), t(4, 2)], tmp_path / "x.pt")
    with pytest.raises(FormatError, match="a list of 3 factors, half a pair too many"):
        adaptc.load(tmp_path / "x.pt")


@pytest.mark.shared
@pytest.mark.parametrize(("name", "count", "tokens"), [
    ("cloneofsimo-analog_svd_rank4", 192, []), ("cloneofsimo-lora_disney", 192, ["<s1>", "<s2>"]),
    ("cloneofsimo-lora_illust-pt", 128, [])])
def test_real_files(shared: Path, tmp_path: Path, name: str, count: int, tokens: list[str]) -> None:
    a = adaptc.load(shared / "corpus" / name)
    assert (len(a.deltas), list(a.extra)) == (count, tokens)
    out = adaptc.save(a, tmp_path / "out.safetensors")
    for source in (shared / "corpus" / name).glob("*.safetensors"):
        assert_verbatim(source, out)
    b = adaptc.compress(a, rank=2)
    assert same(b, adaptc.load(adaptc.save(b, tmp_path / "r2.safetensors")))
