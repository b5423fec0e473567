"""Checkpoints of QWHA's official code: its formula written out, both ways, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file  # noqa: TID251
from scipy.linalg import hadamard

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import NeedsBase
from adaptc.errors import AdaptcError, FormatError, UnsupportedError
from adaptc.measure import relative_error
from adaptc.quant.golomb import Golomb
from adaptc.resolve import resolved
from adaptc.spectral import Spectral

OUT, IN, P = 6, 16, 20


def official(folder: Path, *, width: int = IN, scaling: float = 4000.0, **change: torch.Tensor) -> torch.Tensor:
    """Write a checkpoint as the official code lays it out and return its dW from the published formula."""
    g = torch.Generator().manual_seed(1)
    at = torch.randperm(OUT * width, generator=g)[:P]
    spectrum, stem = torch.randn(P, generator=g), "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"qhft_spectrum": spectrum, "qhft_indices_default": torch.stack([at // width, at % width]),
             "qhft_n_frequency_default": torch.tensor(P), "qhft_scaling_default": torch.tensor(scaling),
             "qhft_random_loc_seed_default": torch.tensor(777)}
    tensors = {f"{stem}.{k}": v for k, v in (parts | change).items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "QHFT", "scaling": scaling}))
    f = torch.zeros(OUT * width, dtype=torch.float64).index_copy_(0, at, spectrum.double()).view(OUT, width)
    if width & (width - 1):
        return f
    h = torch.tensor(hadamard(width)).double() / width**0.5
    return f @ h * scaling / (width**0.5 * OUT**0.5)


def base(folder: Path, width: int = IN) -> Base:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(OUT, width)}, folder / "base.safetensors")
    return Base(folder / "base.safetensors")


def spectral(n: int = IN) -> Spectral:
    at = torch.tensor([0, 3, n, 2 * n + 5, 5 * n])
    return Spectral(Golomb.encode(at, OUT * n, n), torch.randn(5).half(), "sylvester", 0.25, (OUT, n))


def test_official_files_are_read_by_their_formula(tmp_path: Path) -> None:
    expected = official(tmp_path / "a")
    adapter = adaptc.load(tmp_path / "a")
    assert adapter.origin.dialect == "qhft"
    (waiting,) = adapter.deltas.values()
    assert isinstance(waiting, NeedsBase)
    made = resolved(adapter, base(tmp_path)).deltas["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(made, Spectral)
    torch.testing.assert_close(made.dense(), expected, rtol=1e-6, atol=1e-9)


def test_what_is_written_is_read_by_the_same_formula_and_by_ourselves(tmp_path: Path) -> None:
    d = spectral()
    adapter = Adapter({"model.layers.0.self_attn.q_proj.weight": d}, {}, Origin("adaptc", base_model="some/model"))
    adaptc.save(adapter, tmp_path / "q", dialect="qhft")
    read = adaptc.load(tmp_path / "q")
    assert relative_error(read.deltas["model.layers.0.self_attn.q_proj.weight"], d) < 1e-6
    from safetensors.torch import load_file  # noqa: TID251

    held = load_file(tmp_path / "q" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj."
    assert {k.removeprefix(stem) for k in held} == {
        "qhft_spectrum", "qhft_indices_default", "qhft_n_frequency_default", "qhft_scaling_default",
        "qhft_random_loc_seed_default"}
    f = torch.zeros(OUT, IN, dtype=torch.float64)
    rows, cols = held[stem + "qhft_indices_default"].long()
    f[rows, cols] = held[stem + "qhft_spectrum"].double()
    h = torch.tensor(hadamard(IN)).double() / IN**0.5
    scaling = float(held[stem + "qhft_scaling_default"])
    torch.testing.assert_close(f @ h * scaling / (IN * OUT) ** 0.5, d.dense(), rtol=1e-5, atol=1e-7)
    config = json.loads((tmp_path / "q" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["scaling"], config["target_modules"]) == ("QHFT", 4000.0, ["q_proj"])


def test_the_scale_is_free(tmp_path: Path) -> None:
    """alpha rescaled with the coefficients leaves dW as it is."""
    d = spectral()
    other = replace(d, values=d.values.float() * 8, scale=d.scale / 8)
    for i, each in enumerate((d, other)):
        adaptc.save(Adapter({"a.weight": each}, {}, Origin("adaptc")), tmp_path / str(i), dialect="qhft")
    first, second = (adaptc.load(tmp_path / str(i)).deltas["a.weight"].dense() for i in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


def test_widths_that_are_no_powers_of_two_are_refused_by_name(tmp_path: Path) -> None:
    d = Spectral(torch.tensor([1]), torch.ones(1), "paley1:12", 1.0, (OUT, 24))
    with pytest.raises(UnsupportedError, match=r"a\.weight: width 24 is no power of two"):
        adaptc.save(Adapter({"a.weight": d}, {}, Origin("adaptc")), tmp_path / "q", dialect="qhft")
    official(tmp_path / "w", width=24)
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight: qhft at width 24"):
        resolved(adaptc.load(tmp_path / "w"), base(tmp_path, 24))


@pytest.mark.parametrize(("change", "message"), [
    ({"qhft_indices_default": torch.full((2, P), 99)}, "indices reach 99, 99, W0 is 6 x 16"),
    ({"qhft_indices_default": torch.zeros(2, P, dtype=torch.int32)}, "an index is there twice"),
    ({"qhft_indices_default": torch.zeros(2, 3, dtype=torch.int32)}, r"are no \(2, p\) and \(p,\)"),
    ({"qhft_spectrum": torch.zeros(2, P)}, r"are no \(2, p\) and \(p,\)"),
    ({"qhft_scaling_default": torch.tensor(float("nan"))}, "scaling is nan, not a finite number"),
    ({"lora_A": torch.zeros(2, 2)}, "belongs to no known part of a QHFT adapter"),
])
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    official(tmp_path / "a", **change)
    with pytest.raises(AdaptcError, match=message):
        resolved(adaptc.load(tmp_path / "a"), base(tmp_path))


def test_half_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({"base_model.model.q.qhft_spectrum": torch.zeros(3)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "QHFT", "scaling": 1.0}')
    with pytest.raises(FormatError, match="q: has qhft_spectrum, not both"):
        adaptc.load(tmp_path / "a")
