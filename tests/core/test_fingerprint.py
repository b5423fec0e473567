"""The digest of base weights: the same across dtypes and orientations, another for other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import LowRank
from adaptc.errors import FormatError, NeedsError
from adaptc.fingerprint import fingerprint, stamped
from adaptc.tensorfile import write_tensors

W = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


def base(folder: Path, w: torch.Tensor, name: str = "h.0.attn.c_attn.weight", config: dict[str, str] | None = None
         ) -> Base:
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as f:
        write_tensors(f, {name: w}, {})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return Base(folder)


def adapter(shape: tuple[int, int] = (40, 24)) -> Adapter:
    m, n = shape
    return Adapter({"h.0.attn.c_attn.weight": LowRank(torch.ones(1, n), torch.ones(m, 1), None, 1.0, shape)}, {},
                   Origin("peft"))


def test_dtype_and_storage_order_do_not_matter(tmp_path: Path) -> None:
    w = W.to(torch.bfloat16).float()  # what a bf16 checkpoint can hold
    plain = fingerprint(base(tmp_path / "a", w), adapter())
    assert plain == fingerprint(base(tmp_path / "b", w.to(torch.bfloat16)), adapter())
    assert plain == fingerprint(base(tmp_path / "c", w.T.contiguous(), config={"model_type": "gpt2"}), adapter())
    assert len(plain) == 16


def test_other_weights_have_another(tmp_path: Path) -> None:
    one, two = base(tmp_path / "a", W), base(tmp_path / "b", W + 0.1)
    made = stamped(adapter(), one)
    assert made.origin.fingerprint == fingerprint(one, adapter()) != fingerprint(two, adapter())
    assert stamped(made, None) is made
    with pytest.raises(FormatError, match="was made for"):
        stamped(made, two)


def test_a_base_without_the_parameter_or_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="no parameter"):
        fingerprint(base(tmp_path / "a", W, "other.weight"), adapter())
    with pytest.raises(FormatError, match="shape"):
        fingerprint(base(tmp_path / "b", W), adapter((40, 25)))
