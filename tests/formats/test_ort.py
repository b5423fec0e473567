"""ORT GenAI archives: transposed, scale folded, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.errors import FormatError, LossError, UnsupportedError
from adaptc.formats import size_of

STEM = "model.layers.0.attn.q_proj"


def arrays(rank: int = 4, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"{STEM}.lora_A.weight": random.standard_normal((16, rank)).astype(dtype),
            f"{STEM}.lora_B.weight": random.standard_normal((rank, 12)).astype(dtype),
            "model.layers.0.mlp.up_proj.lora_A.MatMul.weight": random.standard_normal((16, rank)).astype(dtype),
            "model.layers.0.mlp.up_proj.lora_B.MatMul.weight": random.standard_normal((rank, 40)).astype(dtype)}


def put(path: Path, held: dict[str, np.ndarray]) -> Path:
    np.savez(path, **held)
    return path


def test_delta_is_what_the_graph_multiplies(tmp_path: Path) -> None:
    held = arrays()
    adapter = adaptc.load(put(tmp_path / "a.npz", held))
    x = np.random.default_rng(1).standard_normal((3, 16))
    want = x @ held[f"{STEM}.lora_A.weight"].astype(float) @ held[f"{STEM}.lora_B.weight"].astype(float)
    got = torch.from_numpy(x) @ adapter.deltas[f"{STEM}.weight"].dense().T
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_untouched_is_the_same_bit_for_bit(dtype: type, tmp_path: Path) -> None:
    held = arrays(dtype=dtype)
    adapter = adaptc.load(put(tmp_path / "a.npz", held))
    out = adaptc.save(adapter, tmp_path / "b.npz")
    assert size_of(adapter) == out.stat().st_size
    with np.load(out) as z:
        assert set(z.files) == set(held)
        assert all(z[k].dtype == v.dtype and np.array_equal(z[k], v) for k, v in held.items())
    assert out.read_bytes() == adaptc.save(adapter, tmp_path / "c.npz").read_bytes()


def test_compressed_and_read_by_numpy(tmp_path: Path) -> None:
    small = adaptc.compress(adaptc.load(put(tmp_path / "a.npz", arrays())), rank=2)
    with np.load(adaptc.save(small, tmp_path / "b.npz")) as z:
        got = (z[f"{STEM}.lora_A.weight"] @ z[f"{STEM}.lora_B.weight"]).T
        assert z[f"{STEM}.lora_A.weight"].shape == (16, 2)
    np.testing.assert_allclose(got, small.deltas[f"{STEM}.weight"].dense().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("edit", "error", "says"), [
    (lambda h: {k: v for k, v in h.items() if "lora_B" not in k}, FormatError, "half an adapter"),
    (lambda h: h | {f"{STEM}.lora_B.weight": np.ones((3, 12), np.float32)}, FormatError, "no common rank"),
    (lambda h: {k: np.ascontiguousarray(v.T) for k, v in h.items() if "q_proj" in k} |
     {f"{STEM}.lora_B.weight": np.ones((16, 4), np.float32)}, FormatError, "not in ONNX's order"),
    (lambda h: h | {f"{STEM}.lora_A.quant.weight": np.ones(3, np.uint8)}, UnsupportedError, "quantized"),
    (lambda h: h | {"x.y": np.ones(3)}, UnsupportedError, "no lora_A or lora_B")])
def test_damaged(edit: object, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        adaptc.load(put(tmp_path / "a.npz", edit(arrays())))  # type: ignore[operator]


def test_names_of_the_base_model_are_not_those_of_the_graph(tmp_path: Path) -> None:
    low = {"model.layers.0.self_attn.q_proj.weight": LowRank(torch.ones(2, 8), torch.ones(6, 2), None, 1.0, (6, 8))}
    with pytest.raises(LossError, match="call this attn"):
        adaptc.save(Adapter(low, {}, Origin("peft")), tmp_path / "x.npz", dialect="ort")
