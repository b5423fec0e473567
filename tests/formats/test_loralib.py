"""loralib and LitGPT: fused projections group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from files import equal, noise, put, put_config, stored

import adaptc
from adaptc.adapter import Adapter
from adaptc.delta import LowRank
from adaptc.errors import FormatError, NeedsError, UnsupportedError


def merged(a: torch.Tensor, b: torch.Tensor, on: list[int], total: int, sizes: list[int], scale: float) -> torch.Tensor:
    """What loralib adds to a fused weight: a grouped convolution of A by B, zero rows between. `on`: starting rows."""
    r, out = b.shape[1], torch.zeros(total, a.shape[1], dtype=a.dtype)
    at = 0
    for i, (start, size) in enumerate(zip(on, sizes, strict=True)):
        part = F.conv1d(a[None, i * r : (i + 1) * r], b[at : at + size, :, None])[0]
        out[start : start + size] = part * scale
        at += size
    return out


def whole(adapter: Adapter, key: str) -> torch.Tensor:
    from adaptc.formats.parts import joined

    return joined(adapter).deltas[key].dense()


def test_linear_and_embedding(tmp_path: Path) -> None:
    tensors = {"h.0.proj.lora_A": noise(4, 16), "h.0.proj.lora_B": noise(12, 4, seed=1), "h.0.proj.bias": noise(12),
               "wte.lora_A": noise(4, 50, seed=2), "wte.lora_B": noise(16, 4, seed=3)}
    path = put(tmp_path / "x.pt", tensors)
    with pytest.raises(NeedsError, match="scale"):
        adaptc.load(path)
    adapter = adaptc.load(path, alpha=8)
    a, b = tensors["h.0.proj.lora_A"].double(), tensors["h.0.proj.lora_B"].double()
    torch.testing.assert_close(adapter.deltas["h.0.proj.weight"].dense(), 2 * b @ a)
    a, b = tensors["wte.lora_A"].double(), tensors["wte.lora_B"].double()
    torch.testing.assert_close(adapter.deltas["wte.weight"].dense(), 2 * (b @ a).T)
    assert set(adapter.replaced) == {"h.0.proj.bias"}
    assert equal(stored(adaptc.save(adapter, tmp_path / "y.pt")), tensors)


def test_three_equal_groups_are_the_thirds(tmp_path: Path) -> None:
    tensors = {"h.attn.c_attn.lora_A": noise(6, 16), "h.attn.c_attn.lora_B": noise(36, 2, seed=1)}
    adapter = adaptc.load(put(tmp_path / "x.pt", tensors), alpha=4)
    want = merged(*(t.double() for t in tensors.values()), [0, 12, 24], 36, [12, 12, 12], 2.0)
    torch.testing.assert_close(whole(adapter, "h.attn.c_attn.weight"), want)
    assert equal(stored(adaptc.save(adapter, tmp_path / "y.pt")), tensors)


def test_two_groups_are_compressed_but_not_placed(tmp_path: Path) -> None:
    """enable_lora is not in the file: q and v, or any two of three."""
    tensors = {"h.attn.c_attn.lora_A": noise(8, 16), "h.attn.c_attn.lora_B": noise(24, 4, seed=1)}
    adapter = adaptc.load(put(tmp_path / "x.pt", tensors), alpha=4)
    small = adaptc.compress(adapter, rank=2)
    held = stored(adaptc.save(small, tmp_path / "y.pt"))
    assert held["h.attn.c_attn.lora_A"].shape == (4, 16)
    assert held["h.attn.c_attn.lora_B"].shape == (24, 2)
    best = torch.linalg.svdvals(adapter.deltas["h.attn.c_attn.weight[part 1]"].dense())[2:]
    got = merged(*(t.double() for t in held.values()), [0, 12], 24, [12, 12], 4 / 2)
    lost = got[12:] - adapter.deltas["h.attn.c_attn.weight[part 1]"].dense()
    torch.testing.assert_close(lost.norm(), best.norm(), rtol=1e-5, atol=0)
    with pytest.raises(UnsupportedError, match="does not tell which rows"):
        adaptc.save(small, tmp_path / "peft", dialect="peft")


def test_groups_of_several_ranks_share_the_largest(tmp_path: Path) -> None:
    tensors = {"a.lora_A": torch.cat([noise(1, 16).expand(4, 16), noise(8, 16, seed=3)]),
               "a.lora_B": noise(36, 4, seed=1)}
    adapter = adaptc.load(put(tmp_path / "x.pt", tensors), alpha=4)
    small = adaptc.compress(adapter, max_error=1e-6)
    assert sorted(d.rank for d in small.deltas.values() if isinstance(d, LowRank)) == [1, 4, 4]
    again = adaptc.load(adaptc.save(small, tmp_path / "y.pt"), alpha=4)
    torch.testing.assert_close(whole(again, "a.weight"), whole(adapter, "a.weight"), rtol=1e-5, atol=1e-5)


def litgpt(at: Path, tensors: dict[str, torch.Tensor], told: str, model: str) -> Path:
    put_config(at, told, "hyperparameters.yaml")
    put_config(at, model, "model_config.yaml")
    torch.save({"model": tensors}, at / "lit_model.pth.lora")
    return at


@pytest.mark.parametrize(("on", "starts", "sizes"), [
    ({"lora_query": True, "lora_key": True, "lora_value": True}, [0, 16, 20], [16, 4, 4]),
    ({"lora_query": True, "lora_key": False, "lora_value": True}, [0, 20], [16, 4])])
def test_litgpt_grouped_query_attention(on: dict[str, Any], starts: list[int], sizes: list[int],
                                        tmp_path: Path) -> None:
    tensors = {"transformer.h.0.attn.qkv.lora_A": noise(2 * len(sizes), 16),
               "transformer.h.0.attn.qkv.lora_B": noise(sum(sizes), 2, seed=1),
               "transformer.h.0.mlp.fc.lora_A": noise(2, 16, seed=2),
               "transformer.h.0.mlp.fc.lora_B": noise(20, 2, seed=3)}
    told = "lora_r: 2\nlora_alpha: 16\n" + "".join(f"{k}: {str(v).lower()}\n" for k, v in on.items())
    at = litgpt(tmp_path / "final", tensors, told, "n_head: 4\nn_query_groups: 1\nhead_size: 4\nn_embd: 16\n")
    adapter = adaptc.load(at)
    a, b = (tensors[f"transformer.h.0.attn.qkv.lora_{x}"].double() for x in "AB")
    want = merged(a, b, starts, 24, sizes, 8.0)
    torch.testing.assert_close(whole(adapter, "transformer.h.0.attn.qkv.weight"), want)
    out = adaptc.save(adapter, tmp_path / "lit_model.pth.lora")
    assert equal(stored(out), tensors)
    assert set(torch.load(out, weights_only=True)) == {"model"}


def test_litgpt_without_its_configs_is_not_guessed(tmp_path: Path) -> None:
    tensors = {"transformer.h.0.attn.qkv.lora_A": noise(6, 16), "transformer.h.0.attn.qkv.lora_B": noise(24, 2)}
    with pytest.raises(FormatError, match="model_config"):
        adaptc.load(put(tmp_path / "lit_model.pth.lora", tensors), alpha=16)


def test_configs_that_contradict_the_tensors(tmp_path: Path) -> None:
    tensors = {"h.attn.qkv.lora_A": noise(6, 16), "h.attn.qkv.lora_B": noise(30, 2)}
    with pytest.raises(FormatError, match="its configs say 24"):
        adaptc.load(litgpt(tmp_path / "x", tensors, "lora_alpha: 16\n", "n_head: 4\nn_query_groups: 1\nhead_size: 4\n"))


def test_convolutions_are_refused(tmp_path: Path) -> None:
    """Their rank is multiplied by the kernel size, so alpha over the stored rank would be wrong by that factor."""
    tensors = {"features.conv1.lora_A": noise(6, 12), "features.conv1.lora_B": noise(18, 6)}
    with pytest.raises(UnsupportedError, match="ConvLoRA"):
        adaptc.load(put(tmp_path / "x.pt", tensors), alpha=8)


def test_converted_to_peft_it_is_one_factor_pair(tmp_path: Path) -> None:
    tensors = {"h.attn.c_attn.lora_A": noise(6, 16), "h.attn.c_attn.lora_B": noise(36, 2, seed=1)}
    adapter = adaptc.load(put(tmp_path / "x.pt", tensors), alpha=4)
    again = adaptc.load(adaptc.save(adapter, tmp_path / "peft", dialect="peft"))
    assert list(again.deltas) == ["h.attn.c_attn.weight"]
    torch.testing.assert_close(again.deltas["h.attn.c_attn.weight"].dense(), whole(adapter, "h.attn.c_attn.weight"))
