"""quantize, decode, verify, convert --prefix, and what the other commands make of containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_adapter

import adaptc as library
from adaptc.formats.portable import FILE
from adaptc.tensorfile import TensorFile, write_tensors


def dense(path) -> dict[str, torch.Tensor]:
    return {k: d.dense() for k, d in library.load(path).deltas.items()}


def disk(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


def error(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    left = sum(float((x[k] - y[k]).square().sum()) for k in x)
    return (left / sum(float(w.square().sum()) for w in x.values())) ** 0.5


def base(folder: Path, factor: float = 1.0) -> Path:
    """Write the weights that the adapter of conftest changes."""
    folder.mkdir()
    weights = {f"model.layers.{i}.self_attn.{p}.weight": torch.arange(out * 32.0).reshape(out, 32) * factor + i
               for i in range(2) for p, out in (("q_proj", 24), ("v_proj", 16))}
    with (folder / "model.safetensors").open("wb") as f:
        write_tensors(f, weights, {})
    return folder


@pytest.fixture
def boxed(adaptc, adapter) -> Path:
    assert adaptc("quantize", adapter, "--bits", 3).code == 0
    return Path("adapter-b3")


def test_quantize_says_what_is_on_disk_and_what_it_decodes_to(adaptc, adapter):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    said = adaptc("quantize", adapter, "--bits", "1.5", "--json")
    assert (said.code, said.err) == (0, "")
    out = Path("adapter-b1.5")
    assert said.data["output"] == str(out)
    assert said.data["bytes"] == {"before": disk(adapter), "after": disk(out)}
    x, y = dense(adapter), dense(out)
    assert said.data["error"] == pytest.approx(error(x, y), rel=1e-4)
    for module in said.data["modules"]:
        assert module["error"] == pytest.approx(error({0: x[module["name"]]}, {0: y[module["name"]]}), rel=1e-4)
    stored = TensorFile(out / FILE)
    params = sum(8 * (w.shape[0] + w.shape[1]) for w in x.values())
    assert 8 * (stored.nbytes("index.0") + stored.nbytes("payload.0")) <= 1.5 * params
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert set(p.name for p in out.iterdir()) == {FILE, "adapter_config.json"}
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "ADAPTC"


@pytest.mark.parametrize(("goal", "name"), [
    (("--bits", "2"), "adapter-b2"), (("--bits", "0.75"), "adapter-b0.75"), (("--size", "2KB"), "adapter-2KB"),
    (("--max-error", "0.2"), "adapter-err0.2"), (("--bits", "2", "--rank", "1"), "adapter-b2"),
    (("--bits", "4", "-o", "x.adaptc.safetensors"), "x.adaptc.safetensors"), (("--bits", "4", "-o", "d/e"), "d/e"),
])
def test_quantize_names_its_output_and_never_overwrites_it(goal, name, adaptc, adapter):
    said = adaptc("quantize", adapter, *goal)
    assert (said.code, said.err) == (0, "")
    out = Path(name)
    held = {p: p.read_bytes() for p in ([out] if out.is_file() else out.iterdir())}
    again = adaptc("quantize", adapter, *goal)
    assert again.code == 2
    assert f"{name} exists" in again.err
    assert {p: p.read_bytes() for p in held} == held
    assert adaptc("quantize", adapter, *goal, "--force").code == 0


def test_goals_are_kept(adaptc, adapter):
    assert adaptc("quantize", adapter, "--size", "2000", "-o", "small").code == 0
    assert 0.9 * 2000 < disk(Path("small")) <= 2000
    assert adaptc("quantize", adapter, "--max-error", "0.2", "-o", "loose").code == 0
    assert 0.1 < error(dense(adapter), dense("loose")) <= 0.2
    assert adaptc("quantize", adapter, "--bits", "2", "--rank", "1", "-o", "one").code == 0
    assert {d.rank for d in library.load("one").deltas.values()} <= {0, 1}


@pytest.mark.parametrize(("args", "says"), [
    ((), "one of --bits"), (("--bits", "1", "--size", "2KB"), "one of --bits"), (("--bits", "0"), "bits"),
    (("--bits", "nan"), "bits"), (("--size", "300B"), "below the smallest possible file"),
    (("--max-error", "2"), "max_error"),
])
def test_quantize_refuses_goals_that_make_no_sense(args, says, adaptc, adapter):
    said = adaptc("quantize", adapter, *args)
    assert said.code == 2
    assert says in said.err
    assert [p.name for p in Path().iterdir()] == ["adapter"]


def test_dry_run_writes_nothing_and_counts_the_same(adaptc, adapter):
    said = adaptc("quantize", adapter, "--bits", "2", "--dry-run", "--json")
    assert said.code == 0
    assert [p.name for p in Path().iterdir()] == ["adapter"]
    done = adaptc("quantize", adapter, "--bits", "2", "--json")
    assert said.data["bytes"] == done.data["bytes"] == {"before": disk(adapter), "after": disk(Path("adapter-b2"))}


def test_decode_gives_the_plain_adapter(adaptc, boxed):
    said = adaptc("decode", boxed, "--json")
    assert (said.code, said.err) == (0, "")
    out = Path("adapter-b3-decoded")
    assert said.data["output"] == str(out)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    x, y = dense(boxed), dense(out)
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert torch.equal(library.load(out).replaced["score.weight"], library.load("adapter").replaced["score.weight"])
    assert adaptc("decode", boxed).code == 2
    assert adaptc("decode", boxed, "-o", boxed, "--force").code == 2  # the input is never replaced
    assert adaptc("decode", boxed, "--to", "mlx", "-o", "mlx", "--allow-loss").code == 0
    assert library.load("mlx").origin.dialect == "mlx"


def test_verify_says_what_it_checked(adaptc, boxed):
    said = adaptc("verify", boxed, "--json")
    assert said.code == 0
    assert said.data == {"input": str(boxed), "ok": True, "tensors": 4, "checksums": 4, "base": "no fingerprint stored",
                         "notes": []}
    assert "is whole" in adaptc("verify", boxed / FILE).out
    plain = adaptc("verify", "adapter")
    assert plain.code == 1
    assert "no adaptc container" in plain.err


def test_verify_finds_a_bit_that_opening_does_not_look_at(adaptc, make):
    big = make("big", edit=lambda tensors, config: tensors.update({
        "base_model.model.model.score.weight": torch.zeros(600, 1000)}))
    assert adaptc("quantize", big, "--bits", "2", "-o", "big.adaptc.safetensors").code == 0
    path = Path("big.adaptc.safetensors")
    data = bytearray(path.read_bytes())
    data[data.index(bytes(1000)) + 500] ^= 1
    path.write_bytes(data)
    assert adaptc("inspect", path).code == 0
    said = adaptc("verify", path)
    assert said.code == 1
    assert "does not match its checksum" in said.err


def test_the_base_is_recognised(adaptc, adapter):
    right, wrong = base(Path("right")), base(Path("wrong"), 1.5)
    assert adaptc("quantize", adapter, "--bits", "3", "--base", right, "-o", "boxed").code == 0
    stored = library.load("boxed").origin.fingerprint
    assert adaptc("verify", "boxed", "--base", right, "--json").data["base"] == f"fingerprint {stored} matches"
    assert "not compared" in adaptc("verify", "boxed").out
    said = adaptc("verify", "boxed", "--base", wrong)
    assert said.code == 1
    assert f"the adapter was made for {stored}" in said.err
    lacking = Path("lacking")
    lacking.mkdir()
    with (lacking / "model.safetensors").open("wb") as f:
        write_tensors(f, {"other.weight": torch.ones(2, 2)}, {})
    assert adaptc("verify", "boxed", "--base", lacking).code == 1
    assert adaptc("quantize", "boxed", "--bits", "2", "--base", wrong, "-o", "again").code == 1
    assert not Path("again").exists()
    assert adaptc("quantize", adapter, "--bits", "3", "-o", "plain").code == 0
    said = adaptc("verify", "plain", "--base", right)
    assert said.code == 1
    assert "no fingerprint" in said.err


def test_prefix_cuts_without_recomputing(adaptc, boxed):
    whole, x = TensorFile(boxed / FILE), dense("adapter")
    last, sizes = error(x, dense(boxed)), []
    for size in (1900, 1800, 1700):
        said = adaptc("convert", boxed, f"p{size}.adaptc.safetensors", "--prefix", size)
        assert (said.code, said.err) == (0, "")
        part = TensorFile(Path(f"p{size}.adaptc.safetensors"))
        sizes.append(disk(part.path))
        assert sizes[-1] <= size
        n = part.nbytes("payload.0")
        assert torch.equal(part["payload.0"], whole["payload.0"][:n])
        now = error(x, dense(part.path))
        assert now >= last
        last = now
        assert adaptc("verify", part.path).code == 0
    assert sizes[0] > sizes[1] > sizes[2]
    assert last < 1
    for args, code, says in ((("--prefix", "300"), 2, "below the smallest possible file"), ((), 2, "--prefix")):
        said = adaptc("convert", boxed, "none.adaptc.safetensors", *args)
        assert (said.code, Path("none.adaptc.safetensors").exists()) == (code, False)
        assert says in said.err
    said = adaptc("convert", "adapter", "none.adaptc.safetensors", "--prefix", "2KB", "--to", "adaptc")
    assert said.code == 2
    assert "no payload" in said.err


def test_plain_factors_are_boxed_and_cut_too(adaptc, adapter):
    assert adaptc("convert", adapter, "whole.adaptc.safetensors", "--to", "adaptc").code == 0
    x, y = dense(adapter), dense("whole.adaptc.safetensors")
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert adaptc("convert", "whole.adaptc.safetensors", "part.adaptc.safetensors", "--prefix", "5000").code == 0
    assert disk(Path("part.adaptc.safetensors")) <= 5000
    assert 0 < error(x, dense("part.adaptc.safetensors")) < 0.3
    Path("short.adaptc.safetensors").write_bytes(Path("whole.adaptc.safetensors").read_bytes()[:-1500])
    said = adaptc("convert", "short.adaptc.safetensors", "mended.adaptc.safetensors", "--to", "adaptc")
    assert said.code == 0
    said = adaptc("verify", "short.adaptc.safetensors")
    assert said.code == 1
    assert "ends early, " in said.err
    assert adaptc("verify", "mended.adaptc.safetensors").code == 0
    short, mended = dense("short.adaptc.safetensors"), dense("mended.adaptc.safetensors")
    assert all(torch.equal(short[k], mended[k]) for k in short)


def test_other_commands_take_containers(adaptc, boxed):
    said = adaptc("inspect", boxed, "--json")
    assert said.data["dialect"] == "adaptc"
    assert {m["kind"] for m in said.data["modules"]} == {"coded"}
    assert {m["dtype"] for m in said.data["modules"]} == {"rd"}
    assert said.data["base"] == "tiny/base"
    assert said.data["history"][0]["spec"] == "quantize{bits=3.0}"
    x, y = dense("adapter"), dense(boxed)
    assert adaptc("diff", "adapter", boxed, "--json").data["error"] == pytest.approx(error(x, y), rel=1e-4)


def test_compress_truncates_containers_unless_that_makes_them_larger(adaptc, adapter, boxed):
    assert adaptc("convert", adapter, "plain.adaptc.safetensors", "--to", "adaptc").code == 0
    said = adaptc("compress", "plain.adaptc.safetensors", "--rank", "1", "--json")
    assert said.data["output"] == "plain.r1.adaptc.safetensors"
    assert library.load("plain.r1.adaptc.safetensors").origin.container == "adaptc"
    x, y = dense(adapter), dense("plain.r1.adaptc.safetensors")
    for k, w in x.items():
        u, s, v = torch.linalg.svd(w)
        torch.testing.assert_close(y[k], s[0] * u[:, :1] @ v[:1], atol=1e-4, rtol=1e-4)
    said = adaptc("compress", boxed, "--rank", "1")
    assert said.code == 0
    assert "kept as it is: rank 1 factors would be larger" in said.out
    x, y = dense(boxed), dense("adapter-b3-r1")
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_dora_keeps_its_magnitude_and_codes_its_direction(adaptc, make):
    def dora(tensors, config):
        config["use_dora"] = True
        for key in [k for k in tensors if k.endswith("lora_B.weight")]:
            stem = key.removesuffix("lora_B.weight")
            tensors[f"{stem}lora_magnitude_vector.weight"] = torch.rand(len(tensors[key]))

    source = make("dora", edit=dora)
    said = adaptc("quantize", source, "--bits", "3")
    assert (said.code, said.err) == (0, "")
    x, y = library.load(source).deltas, library.load("dora-b3").deltas
    assert x.keys() == y.keys()
    for key in x:
        assert torch.equal(x[key].tensors["magnitude"], y[key].tensors["magnitude"])
        assert error({0: x[key].inner.dense()}, {0: y[key].inner.dense()}) < 0.1
    assert TensorFile(Path("dora-b3") / FILE).nbytes("payload.0") < 1000
    assert adaptc("verify", "dora-b3").code == 0
    assert adaptc("convert", "dora-b3", "dora-part.adaptc.safetensors", "--prefix", "2700").code == 0
    assert disk(Path("dora-part.adaptc.safetensors")) <= 2700


def test_a_file_beside_gets_the_suffix(adaptc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("folder"))
    assert adaptc("convert", "folder", "a.adaptc.safetensors", "--to", "adaptc").code == 0
    assert adaptc("quantize", "a.adaptc.safetensors", "--bits", "2").code == 0
    assert Path("a.b2.adaptc.safetensors").is_file()
    assert adaptc("decode", "a.b2.adaptc.safetensors", "--to", "peft").code == 0
    x, y = dense("a.b2.adaptc.safetensors"), dense("a.b2.decoded.safetensors")
    assert all(torch.equal(x[k], y[k]) for k in x)
