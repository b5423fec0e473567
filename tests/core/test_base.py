"""Base weights from folders, shards and bitsandbytes checkpoints, and what is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.base import Base
from adaptc.base_bnb import Dequantised
from adaptc.cli.main import main
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.tensorfile import write_tensors


def write(path: Path, **tensors: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        write_tensors(f, {k.replace("__", "."): t for k, t in tensors.items()}, {})
    return path


def test_shards_of_an_index_and_nothing_beside(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00002.safetensors", model__a__weight=torch.ones(2, 3))
    write(tmp_path / "model-00002-of-00002.safetensors", model__b__weight=torch.zeros(4))
    write(tmp_path / "consolidated.safetensors", other__weight=torch.ones(1))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.a.weight": "model-00001-of-00002.safetensors",
                                                "model.b.weight": "model-00002-of-00002.safetensors"}}))
    assert set(Base(tmp_path)) == {"model.a.weight", "model.b.weight"}
    assert torch.equal(Base(tmp_path)["a.weight"], torch.ones(2, 3))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NeedsError, match="lacks 1 of 2 shards of its index, as model-00002-of-00002"):
        Base(tmp_path)
    for text, said in [("{", "not JSON"), ("[]", "not a JSON object"), ('{"weight_map": 3}', "no map of file names")]:
        index.write_text(text)
        with pytest.raises(FormatError, match=said):
            Base(tmp_path)


def test_the_whole_model_wins_and_adapters_are_none(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", a__weight=torch.ones(2))
    write(tmp_path / "model.fp16.safetensors", a__weight=torch.zeros(2))
    write(tmp_path / "adapter_model.safetensors", b__weight=torch.zeros(2))
    assert dict(Base(tmp_path)).keys() == {"a.weight"}
    assert torch.equal(Base(tmp_path)["a.weight"], torch.ones(2))


def test_a_config_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model.safetensors", a__weight=torch.ones(2))
    for text, said in (("{", "not JSON"), ('"x"', "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError, match=f"config.json: {said}"):
            Base(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert main(["diff", "x", "y", "--base", str(tmp_path)]) in (1, 2)
    assert "internal" not in capsys.readouterr().err


def test_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NeedsError, match="holds no safetensors weights"):
        Base(tmp_path)
    with pytest.raises(NeedsError, match="does not exist"):
        Base(tmp_path / "nothing" / "here.gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="nobody/has-this does not exist here and could not be fetched"):
        Base(Path("nobody/has-this"))


def test_hub_ids_go_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.safetensors", a__weight=torch.ones(2))
    asked: list[tuple[str, list[str]]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert set(Base(Path("owner/model"))) == {"a.weight"}
    assert asked == [("owner/model", ["*.json", "*.safetensors"])]


def four_bits(w: Tensor, kind: str, nested: bool, block: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a weight as bitsandbytes saves it, and as bitsandbytes decodes it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=block)
    saved = {"m.weight": codes} | {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return saved, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.float16, 128)])
def test_four_bits_as_bitsandbytes_decodes_them(kind: str, nested: bool, dtype: torch.dtype, block: int) -> None:
    w = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    saved, expected = four_bits(w, kind, nested, block)
    decoded = Dequantised({"m.bias": torch.ones(96), **saved})
    assert set(decoded) == {"m.weight", "m.bias"}
    assert decoded["m.weight"].dtype == dtype
    assert torch.equal(decoded["m.weight"], expected)


def test_rows_that_are_no_whole_blocks() -> None:
    w = torch.randn(33, 80, generator=torch.Generator().manual_seed(1))
    saved, _ = four_bits(w, "nf4", False, 64)
    # bitsandbytes' CPU kernel takes blocks to start anew at every row, its quantiser does not: compare with the weight
    assert float((Dequantised(saved)["m.weight"] - w).norm() / w.norm()) < 0.1
    broken = saved | {"m.weight.absmax": saved["m.weight.absmax"][1:]}
    with pytest.raises(FormatError, match=r"m.weight: 1320 bytes, 41 scales and 16 levels are no 4-bit weight"):
        Dequantised(broken)["m.weight"]
    lost = {k: v for k, v in saved.items() if not k.endswith("quant_map")}
    with pytest.raises(FormatError, match="4-bit state is incomplete"):
        Dequantised(lost)["m.weight"]
    state = next(k for k in saved if "quant_state" in k)
    for text, said in ((b"{", "not JSON"), (b"[]", "not a JSON object"), (b"{}", "incomplete")):
        with pytest.raises(FormatError, match=said):
            Dequantised(saved | {state: torch.tensor(list(text), dtype=torch.uint8)})["m.weight"]


def test_eight_bits_and_codes_without_scales() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    codes, scales, _ = functional.int8_vectorwise_quant(w.half())
    decoded = Dequantised({"m.weight": codes, "m.SCB": scales, "m.weight_format": torch.zeros((), dtype=torch.uint8)})
    assert set(decoded) == {"m.weight"}
    assert torch.allclose(decoded["m.weight"], functional.int8_vectorwise_dequant(codes, scales), rtol=1e-6)
    with pytest.raises(FormatError, match=r"SCB \(23,\)"):
        Dequantised({"m.weight": codes, "m.SCB": scales[1:]})["m.weight"]
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(UnsupportedError, match="without scales"):
            Dequantised({"m.weight": codes.to(dtype)})["m.weight"]
    ids = torch.arange(4)[None]
    assert torch.equal(Dequantised({"embeddings.position_ids": ids})["embeddings.position_ids"], ids)


def test_a_folder_of_codes_is_a_base(tmp_path: Path) -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    saved, expected = four_bits(w, "nf4", True, 64)
    with (tmp_path / "model.safetensors").open("wb") as f:
        write_tensors(f, {f"model.{k}": t for k, t in saved.items()}, {})
    base = Base(tmp_path)
    assert list(base) == ["model.m.weight"]
    assert torch.equal(base.weight("m.weight", (16, 64)), expected)
