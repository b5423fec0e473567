"""Sam_LoRA, LoRA-ViT and Bi-LoRA: parts of a fused qkv, and one-bit files byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from files import equal, noise, put, put_config, stored

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.errors import FormatError, LossError, NeedsError, UnsupportedError
from adaptc.factor import decoded
from adaptc.formats.parts import joined
from adaptc.formats.petlvit import BLOCKS, WIDTH, unpack_bits

SAM = {f"w_{x}_{i:03d}": noise(4, 16, seed=i) if x == "a" else noise(12, 4, seed=i + 9) for i in range(4) for x in "ab"}


def test_sam_pairs_are_q_and_v_of_the_fused_rows(tmp_path: Path) -> None:
    adapter = adaptc.load(put(tmp_path / "x.safetensors", SAM))
    for block in range(2):
        want = torch.zeros(36, 16, dtype=torch.float64)
        want[:12] = SAM[f"w_b_{2 * block:03d}"].double() @ SAM[f"w_a_{2 * block:03d}"].double()
        want[-12:] = SAM[f"w_b_{2 * block + 1:03d}"].double() @ SAM[f"w_a_{2 * block + 1:03d}"].double()
        got = joined(adapter).deltas[f"image_encoder.blocks.{block}.attn.qkv.weight"]
        torch.testing.assert_close(got.dense(), want)
    assert equal(stored(adaptc.save(adapter, tmp_path / "y.safetensors")), SAM)


def test_sam_compressed_keeps_its_names_and_scale_one(tmp_path: Path) -> None:
    small = adaptc.compress(adaptc.load(put(tmp_path / "x.safetensors", SAM)), rank=2)
    held = stored(adaptc.save(small, tmp_path / "y.safetensors"))
    assert set(held) == set(SAM)
    for i, delta in enumerate(small.deltas.values()):
        torch.testing.assert_close(held[f"w_b_{i:03d}"].double() @ held[f"w_a_{i:03d}"].double(), delta.dense())
        assert held[f"w_a_{i:03d}"].shape == (2, 16)


def test_an_emptied_pair_is_still_there_for_the_loader(tmp_path: Path) -> None:
    adapter = adaptc.load(put(tmp_path / "x.safetensors", SAM))
    nothing = LowRank(torch.empty(0, 16), torch.empty(12, 0), None, 1.0, (12, 16))
    emptied = adapter.map(lambda k, d: nothing if k == "image_encoder.blocks.1.attn.qkv.weight[0:12]" else d)
    held = stored(adaptc.save(emptied, tmp_path / "y.safetensors"))
    assert set(held) == set(SAM)
    assert not held["w_b_002"].any()


def test_lora_vit_needs_alpha_for_its_integer_division(tmp_path: Path) -> None:
    path = put(tmp_path / "x.safetensors", SAM | {"fc_16in_5out": noise(5, 16)})
    with pytest.raises(NeedsError, match="alpha // r"):
        adaptc.load(path)
    adapter = adaptc.load(path, alpha=11)
    assert {d.scale for d in adapter.deltas.values() if isinstance(d, LowRank)} == {2.0}
    assert next(iter(adapter.deltas)) == "blocks.0.attn.qkv.weight[0:12]"
    assert set(adapter.replaced) == {"fc_16in_5out"}
    with pytest.raises(FormatError, match="changes nothing"):
        adaptc.load(path, alpha=3)


@pytest.mark.parametrize(("edit", "says"), [
    (lambda t: {k: v for k, v in t.items() if k[2] == "a"}, "half an adapter"),
    (lambda t: t | {"w_a_001": noise(12, 4)}, "no pair"),
    (lambda t: {k: v for k, v in t.items() if not k.endswith("003")}, "not q and v of every block"),
    (lambda t: t | {"w_a_000": torch.empty(0)}, "no pair")])
def test_sam_damaged(edit: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        adaptc.load(put(tmp_path / "x.safetensors", edit(SAM)))  # type: ignore[operator]


def test_variants_of_lora_vit_are_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="w_a_000_bia"):
        adaptc.load(put(tmp_path / "x.safetensors", SAM | {"w_a_000_bia": noise(4)}))


# Bi-LoRA
def petl(at: Path, dim: int = 1, classes: int = 8, bihead: bool = False) -> Path:
    """Write a file of random codes as the published ones are laid out."""
    random = np.random.default_rng(5)
    layers = [random.bytes(WIDTH * dim // 8) + np.array([0.01, 0.5], "<f4").tobytes() for _ in range(4 * BLOCKS)]
    head = (random.bytes(classes * WIDTH // 8) + np.array([0.0, 1.0], "<f4").tobytes() if bihead
            else random.standard_normal(classes * (WIDTH + 1)).astype("<f4").tobytes())
    method = "lora-bihead" if bihead else "lora"
    put_config(at, f"method: {method}\nbit: 1\ndim: {dim}\nscale: 0.1\nnum_class: {classes}\n", "config.yaml")
    (at / "x.bin").write_bytes(b"".join(layers) + head)
    return at


@pytest.mark.parametrize("bihead", [False, True])
@pytest.mark.parametrize("dim", [1, 3])
def test_bilora_goes_back_byte_for_byte(dim: int, bihead: bool, tmp_path: Path) -> None:
    at = petl(tmp_path / "in", dim, bihead=bihead)
    adapter = adaptc.load(at)
    assert len(adapter.deltas) == 2 * BLOCKS
    assert set(adapter.replaced) == ({"head.weight"} if bihead else {"head.weight", "head.bias"})
    out = adaptc.save(adapter, tmp_path / "y.bin", dialect="petlvit")
    assert out.read_bytes() == (at / "x.bin").read_bytes()


def test_bilora_means_are_not_dropped(tmp_path: Path) -> None:
    delta = adaptc.load(petl(tmp_path / "in")).deltas["blocks.0.attn.qkv.weight[0:768]"]
    assert isinstance(delta, LowRank)
    assert delta.scale == 0.1
    low, high = decoded(delta.a).unique().tolist()
    assert (low + high) / 2 == pytest.approx(0.01, abs=1e-7)
    assert (high - low) / 2 == pytest.approx(0.5 * 0.6744897501960817, abs=1e-7)


def test_bilora_compressed_becomes_peft_on_the_fused_weight(tmp_path: Path) -> None:
    adapter = adaptc.load(petl(tmp_path / "in", dim=3))
    small = adaptc.compress(adapter, rank=2)
    out = adaptc.save(small, tmp_path / "out")
    again = adaptc.load(out)
    assert again.origin.dialect == "peft"
    want = joined(small).deltas["blocks.3.attn.qkv.weight"].dense()
    assert not want[WIDTH : 2 * WIDTH].any()  # k is not adapted
    torch.testing.assert_close(again.deltas["blocks.3.attn.qkv.weight"].dense(), want)
    assert set(again.replaced) == {"head.weight", "head.bias"}
    with pytest.raises(LossError, match="not the one-bit codes"):
        adaptc.save(small, tmp_path / "y.bin", dialect="petlvit")


def test_bilora_refusals(tmp_path: Path) -> None:
    at = petl(tmp_path / "a")
    with (at / "x.bin").open("ab") as f:
        f.write(b"1")
    with pytest.raises(FormatError, match="too long"):
        adaptc.load(at)
    for i, (old, new, error) in enumerate((("method: lora", "method: adaptformer", UnsupportedError),
                                           ("bit: 1", "bit: 2", UnsupportedError), ("dim: 1", "dim: -1", FormatError),
                                           ("scale: 0.1", "scale: x", FormatError))):
        at = petl(tmp_path / str(i))
        (at / "config.yaml").write_text((at / "config.yaml").read_text().replace(old, new))
        with pytest.raises(error):
            adaptc.load(at)
    low = {"x.weight": LowRank(noise(2, 8), noise(6, 2), None, 1.0, (6, 8))}
    with pytest.raises(LossError):
        adaptc.save(Adapter(low, {}, Origin("peft")), tmp_path / "y.bin", dialect="petlvit")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["petlvit-lora-cifar-bit1-r1", "petlvit-lora-cifar-bit1-r32"])
def test_bilora_equals_the_published_decoding(name: str, shared: Path) -> None:
    adapter = adaptc.load(shared / "corpus" / name)
    oracle = stored(shared / "corpus" / name / "decoded.safetensors")
    for key, t in oracle.items():
        if key.startswith("head."):
            assert torch.equal(adapter.replaced[key], t)  # type: ignore[arg-type]
            continue
        _, block, _, part, factor, _ = key.split(".")
        start = 0 if part == "lora_q" else 2 * WIDTH
        delta = adapter.deltas[f"blocks.{block}.attn.qkv.weight[{start}:{start + WIDTH}]"]
        assert isinstance(delta, LowRank)
        assert torch.equal(decoded(delta.a if factor == "lora_A" else delta.b), t)


def test_bits_are_little_end_first() -> None:
    raw = bytes([0b00000101]) + np.array([0.0, 1.0], "<f4").tobytes()
    t, _ = unpack_bits(raw, 0, (1, 8))
    assert (t > 0).tolist() == [[True, False, True, False, False, False, False, False]]
    assert set(t.abs().flatten().tolist()) == {float(np.float32(0.6744897501960817))}
