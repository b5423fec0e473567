"""torchtune: alpha stays, ranks are one, names are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from files import equal, noise, put, put_config, stored

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, NeedsError

STEM = "layers.0.attn."
TENSORS = {f"{STEM}q_proj.lora_a.weight": noise(4, 16), f"{STEM}q_proj.lora_b.weight": noise(12, 4, seed=1),
           f"{STEM}v_proj.lora_a.weight": noise(4, 16, seed=2), f"{STEM}v_proj.lora_b.weight": noise(6, 4, seed=3),
           "output.lora_a.weight": noise(4, 16, seed=4), "output.lora_b.weight": noise(30, 4, seed=5)}


def made(at: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """adapter_0.pt beside the PEFT export that torchtune writes with it."""
    put_config(at / "in", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "m"})
    put(at / "in" / "adapter_model.bin", {"base_model.model.x.lora_A.weight": noise(4, 3)})
    return put(at / "in" / "adapter_0.pt", TENSORS | (extra or {}))


def test_read_with_the_alpha_of_the_export_beside_it(tmp_path: Path) -> None:
    adapter = adaptc.load(made(tmp_path))
    a, b = (TENSORS[f"{STEM}q_proj.lora_{x}.weight"].double() for x in "ab")
    torch.testing.assert_close(adapter.deltas[f"{STEM}q_proj.weight"].dense(), 8 / 4 * b @ a)
    assert adapter.origin.base_model == "m"


def test_alone_it_needs_alpha(tmp_path: Path) -> None:
    path = put(tmp_path / "adapter_0.pt", TENSORS)
    with pytest.raises(NeedsError, match="scale"):
        adaptc.load(path)
    assert adaptc.load(path, alpha=8).deltas[f"{STEM}q_proj.weight"].scale == 2.0  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_untouched_is_the_same_bit_for_bit(suffix: str, tmp_path: Path) -> None:
    source = made(tmp_path, {f"{STEM}q_proj.magnitude": noise(12).abs(), "norm.scale": noise(16)})
    adapter = adaptc.load(source)
    assert isinstance(adapter.deltas[f"{STEM}q_proj.weight"], NeedsBase)
    assert equal(stored(source), stored(adaptc.save(adapter, tmp_path / f"out{suffix}")))


def test_a_new_rank_needs_only_lora_rank_of_the_recipe(tmp_path: Path) -> None:
    small = adaptc.compress(adaptc.load(made(tmp_path)), rank=2)
    held = stored(adaptc.save(small, tmp_path / "adapter_0.pt"))
    for module in ("q_proj", "v_proj"):
        a, b = (held[f"{STEM}{module}.lora_{x}.weight"].double() for x in "ab")
        assert a.shape[0] == 2
        torch.testing.assert_close(8 / 2 * b @ a, small.deltas[f"{STEM}{module}.weight"].dense(), rtol=1e-6, atol=1e-6)


def test_mixed_ranks_are_padded_to_one(tmp_path: Path) -> None:
    low = {f"{STEM}{m}_proj.weight": LowRank(noise(r, 8), noise(6, r), None, 8 / r, (6, 8))
           for m, r in (("q", 1), ("v", 3))}
    adapter = Adapter(low, {}, Origin("torchtune", {"lora_alpha": 8.0}))
    held = stored(adaptc.save(adapter, tmp_path / "x.pt"))
    for key, delta in low.items():
        a, b = (held[key.replace("weight", f"lora_{x}.weight")].double() for x in "ab")
        assert a.shape[0] == 3
        torch.testing.assert_close(8 / 3 * b @ a, delta.dense(), rtol=1e-6, atol=1e-6)


def test_size_is_exact(tmp_path: Path) -> None:
    from adaptc.formats import size_of

    adapter = adaptc.load(made(tmp_path))
    assert size_of(adapter) == adaptc.save(adapter, tmp_path / "x.pt").stat().st_size


def test_foreign_names_are_refused(tmp_path: Path) -> None:
    low = {"model.layers.0.self_attn.q_proj.weight": LowRank(noise(2, 8), noise(6, 2), None, 1.0, (6, 8))}
    with pytest.raises(LossError, match="rotary row order"):
        adaptc.save(Adapter(low, {}, Origin("peft")), tmp_path / "x.pt", dialect="torchtune")


def test_damaged(tmp_path: Path) -> None:
    for i, (name, t, says) in enumerate(((f"{STEM}q_proj.magnitude", noise(3), "magnitude has 3"),
                                         (f"{STEM}q_proj.lora_b.weight", noise(12, 3), "no common rank"),
                                         (f"{STEM}k_proj.lora_a.weight", noise(4, 16), "half an adapter"))):
        with pytest.raises(FormatError, match=says):
            adaptc.load(made(tmp_path / str(i), {name: t}))
