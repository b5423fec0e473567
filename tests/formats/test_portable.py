"""The container: everything an adapter holds comes back, prefixes are adapters, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin, Rows, Step, tensors
from adaptc.coded import Coded
from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError
from adaptc.formats.portable import FILE, Portable
from adaptc.lowrank import low_rank
from adaptc.measure import relative_error
from adaptc.tensorfile import TensorFile, write_tensors


def t(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pair(m: int = 12, n: int = 20, r: int = 3, seed: int = 0, scale: float = 0.3, dtype: torch.dtype = torch.float32
         ) -> LowRank:
    return LowRank(t(r, n, seed=seed, dtype=dtype), t(m, r, seed=seed + 1, dtype=dtype), None, scale, (m, n))


def everything() -> Adapter:
    deltas = {f"layers.{i}.{p}.weight": pair(seed=10 * i + j, r=2 + i) for i in range(3) for j, p in enumerate("qkv")}
    deltas |= {
        "half.weight": pair(dtype=torch.bfloat16, scale=2.0),
        "core.weight": LowRank(t(3, 20), t(12, 2), t(2, 3), -1.5, (12, 20)),
        "conv.weight": LowRank(t(3, 36), t(8, 3), None, 1.0, (8, 4, 3, 3)),
        "experts.up": LowRank(t(4, 2, 20), t(4, 12, 2), None, 0.5, (4, 12, 20)),
        "kron.weight": Kron(Dense(t(3, 5), 1.0, (3, 5)), pair(4, 4, 2, scale=1.0), 0.7, (12, 20)),
        "had.weight": Hadamard(pair(seed=3), pair(seed=4), 0.2, (12, 20)),
        "sum.weight": Sum((pair(seed=5), Sparse(torch.tensor([1, 7]), t(2), 1.0, (12, 20))), (12, 20)),
        "sparse.weight": Sparse(torch.tensor([0, 5, 239]), t(3), 1.0, (12, 20)),
        "q.bias": Dense(t(12), 0.3, (12,)),
        "dora.weight": NeedsBase("dora", {"magnitude": t(12)}, {"axis": 0}, (12, 20), pair(seed=6)),
        "dora2.weight": NeedsBase("dora", {"magnitude": t(12, seed=2)}, {"axis": 0}, (12, 20), pair(seed=7, scale=0.9)),
        "gone.weight": LowRank(torch.empty(0, 20), torch.empty(12, 0), None, 1.0, (12, 20)),
    }
    replaced = {"head.weight": t(2, 12), "emb.weight": Rows((3, 9), t(2, 5))}
    config = {"peft_type": "LORA", "r": 3, "odd": [1, None, "é"]}
    origin = Origin("peft", config, {"format": "pt"}, "org/base", {"f": 1},
                    {"head.weight": "base_model.model.head.weight"}, {"experts.up": "experts:experts"}, ("a note",))
    return Adapter(deltas, replaced, origin, (Step("truncate{rank=3}", "0.1.0", 100, 50, 0.25),), {"state": t(3)})  # type: ignore[arg-type]


def round_trip(a: Adapter, path: Path) -> Adapter:
    return adaptc.load(adaptc.save(a, path / "x.adaptc.safetensors", dialect="adaptc"))


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    a = everything()
    b = round_trip(a, tmp_path)
    assert set(a.deltas) == set(b.deltas)
    for key, before in a.deltas.items():
        after = b.deltas[key]
        if isinstance(after, Coded):
            after = low_rank(after)  # type: ignore[assignment]
        assert type(after) is type(before), key
        assert after.shape == before.shape
        assert getattr(after, "scale", None) == getattr(before, "scale", None)
        mine, theirs = tensors(before), tensors(after)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), (key, name)
    assert torch.equal(b.replaced["head.weight"], a.replaced["head.weight"])  # type: ignore[arg-type]
    rows = b.replaced["emb.weight"]
    assert isinstance(rows, Rows)
    assert rows.indices == (3, 9)
    assert torch.equal(b.extra["state"], a.extra["state"])
    assert b.history == a.history
    for name in ("dialect", "config", "metadata", "base_model", "names", "layout", "notes"):
        assert getattr(b.origin, name) == getattr(a.origin, name), name


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first = adaptc.save(everything(), tmp_path / "1.adaptc.safetensors", dialect="adaptc")
    second = adaptc.save(adaptc.load(first), tmp_path / "2.adaptc.safetensors")
    third = adaptc.save(adaptc.load(second), tmp_path / "3.adaptc.safetensors")
    assert second.read_bytes() == third.read_bytes()
    assert second.stat().st_size == first.stat().st_size


def test_size_is_exact_on_meta_tensors_too(tmp_path: Path) -> None:
    a = everything()
    path = adaptc.save(a, tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    assert Portable().size(a, folder=False) == path.stat().st_size
    meta = a.map(lambda _, d: LowRank(d.a.to("meta"), d.b.to("meta"), d.core, d.scale, d.shape)  # type: ignore[union-attr]
                 if isinstance(d, LowRank) and d.core is None else d)
    assert Portable().size(meta, folder=False) == path.stat().st_size


def test_any_prefix_of_the_payload_is_a_smaller_adapter(tmp_path: Path) -> None:
    a = Adapter({f"m{i}.weight": pair(40, 50, 6, seed=i, scale=1.0 + i) for i in range(4)}, {}, Origin("peft"))
    path = adaptc.save(a, tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    whole = path.read_bytes()
    file = TensorFile(path)
    start = len(whole) - file.nbytes("payload.0")
    last = -1.0
    for cut in range(start, len(whole) + 1, 997):
        short = tmp_path / "short.adaptc.safetensors"
        short.write_bytes(whole[:cut])
        b = adaptc.load(short)
        kept = sum(1 - relative_error(a.deltas[k], b.deltas[k]) ** 2 for k in a.deltas)
        assert kept >= last - 1e-9
        last = kept
        if cut < len(whole):
            assert any("ends inside payload.0" in n for n in b.origin.notes)
    short.write_bytes(whole[: start - 1])
    with pytest.raises(FormatError, match="truncated"):
        adaptc.load(short)


def test_chunks_lie_by_error_removed_a_byte(tmp_path: Path) -> None:
    strong, weak = pair(40, 50, 4, scale=10.0), pair(40, 50, 4, seed=9, scale=0.1)
    a = Adapter({"weak.weight": weak, "strong.weight": strong}, {}, Origin("peft"))
    path = adaptc.save(a, tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    short = tmp_path / "half.adaptc.safetensors"
    data = path.read_bytes()
    short.write_bytes(data[: len(data) - 4 * 90 * 4])
    b = adaptc.load(short)
    assert [b.deltas[k].rank for k in ("strong.weight", "weak.weight")] == [4, 0]  # type: ignore[union-attr]


def test_a_folder_stops_stock_peft(tmp_path: Path) -> None:
    out = adaptc.save(everything(), tmp_path / "out", dialect="adaptc")
    assert (out / FILE).is_file()
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "ADAPTC"
    assert set(adaptc.load(out).deltas) == set(everything().deltas)
    peft = pytest.importorskip("peft")
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(str(out))


def test_the_original_dialect_is_written_again(tmp_path: Path) -> None:
    plain = Adapter({"q.weight": pair(scale=1.0)}, {}, Origin("peft", {"peft_type": "LORA", "r": 3, "lora_alpha": 3}))
    first = adaptc.save(plain, tmp_path / "plain")
    boxed = round_trip(adaptc.load(first), tmp_path)
    again = adaptc.save(boxed, tmp_path / "again", dialect="peft")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    one, two = (json.loads((f / "adapter_config.json").read_text()) for f in (first, again))
    assert one == two


def rewritten(path: Path, out: Path, **changes: object) -> Path:
    """Write the container again with manifest fields replaced (None removes one)."""
    file = TensorFile(path)
    manifest = json.loads(file.metadata["adaptc"])
    for key, value in changes.items():
        manifest[key] = value
        if value is None:
            del manifest[key]
    with out.open("wb") as f:
        write_tensors(f, dict(file.items()), {"adaptc": json.dumps(manifest)})
    return out


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = adaptc.save(everything(), tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    bad = tmp_path / "bad.adaptc.safetensors"
    bad.write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        adaptc.load(bad)


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": 2}, "newer than 1"),
    ({"format": None}, "no format version"),
    ({"codes": [{"codec": "nope", "modules": []}]}, "nope"),
    ({"codes": []}, "not named in the manifest"),
    ({"groups": 3}, "groups is no list"),
    ({"replaced": {"head.weight": "carried.99"}}, "does not hold"),
    ({"sums": {}}, "disagree about tensor"),
])
def test_manifests_that_lie_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = adaptc.save(everything(), tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    with pytest.raises(adaptc.AdaptcError, match=message):
        adaptc.load(rewritten(path, tmp_path / "bad.adaptc.safetensors", **changes))
