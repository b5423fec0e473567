"""The change of a whole model: read where it is, exact where it is sparse, nothing dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.base import Base
from adaptc.delta import Dense, Sparse
from adaptc.errors import FormatError
from adaptc.prune import extract
from adaptc.prune.extract import Difference, extracted, is_model
from adaptc.prune.shira import Sparsify
from adaptc.tensorfile import write_tensors


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


WEIGHTS = {"h.0.attn.c_attn.weight": t(16, 48), "h.0.mlp.up.weight": t(24, 16), "h.0.mlp.up.bias": t(24),
           "wte.weight": t(50, 16), "ln.weight": t(16), "conv.weight": t(6, 4, 3, 3)}


def folder(path: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """Write a model folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "_name_or_path": "org/tiny", **config}))
    with (path / "model.safetensors").open("wb") as f:
        write_tensors(f, weights, {})
    return path


def tuned(**changes: Tensor) -> dict[str, Tensor]:
    """Return the weights with a few entries of a matrix, a projection stored (in, out) and a bias changed."""
    new = {k: v.clone() for k, v in WEIGHTS.items()}
    new["h.0.mlp.up.weight"].view(-1)[[3, 100, 383]] += 0.5
    new["h.0.attn.c_attn.weight"][2, 40] -= 1.0
    new["conv.weight"][5, 1, 2, 0] = 9.0
    new["h.0.mlp.up.bias"] += 1.0
    return {**new, **{k.replace("__", "."): v for k, v in changes.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_change_is_extracted_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    old = {k: v.to(dtype) for k, v in WEIGHTS.items()}
    new = {k: v.to(dtype) for k, v in tuned(classifier__weight=t(2, 16)).items()}
    base, model = Base(folder(tmp_path / "base", old)), Base(folder(tmp_path / "tuned", new))
    change = extracted(model, base)
    assert change.lost == ()
    assert set(change.adapter.deltas) == {"h.0.mlp.up.weight", "h.0.attn.c_attn.weight", "conv.weight"}
    assert change.adapter.deltas["h.0.attn.c_attn.weight"].shape == (48, 16)
    assert set(change.adapter.replaced) == {"h.0.mlp.up.bias", "classifier.weight"}
    assert change.adapter.origin.base_model == "org/tiny"
    outcome = Sparsify(density=0.05)(change.adapter)
    assert outcome.error < 1e-7  # a difference of two float32 needs not be one
    for key, delta in outcome.adapter.deltas.items():
        assert isinstance(delta, Sparse)
        assert delta.values.numel() == {"h.0.mlp.up.weight": 3}.get(key, 1)
        w0 = base.weight(key, delta.shape)
        made = (w0.double() + delta.dense().reshape(w0.shape)).to(dtype)
        assert torch.equal(made, model.weight(key, delta.shape))


def test_a_dense_change_keeps_its_largest_entries(tmp_path: Path) -> None:
    new = tuned(h__0__mlp__up__weight=WEIGHTS["h.0.mlp.up.weight"] + t(24, 16, seed=9) ** 3)
    base, model = Base(folder(tmp_path / "base", WEIGHTS)), Base(folder(tmp_path / "tuned", new))
    made = Sparsify(density=0.2, accept_loss=True)(extracted(model, base).adapter).adapter
    delta, dw = made.deltas["h.0.mlp.up.weight"], new["h.0.mlp.up.weight"] - WEIGHTS["h.0.mlp.up.weight"]
    assert isinstance(delta, Sparse)
    assert torch.equal(delta.places(), dw.flatten().abs().topk(77).indices.sort().values)


def test_rows_are_read_as_they_are_asked_for() -> None:
    new, old = t(9, 5, 2), t(9, 5, 2, seed=3)
    change = Difference.of(new, old)
    assert torch.equal(change.rows(2, 4), (new.double() - old.double())[2:4].reshape(2, 10))
    assert torch.equal(change.decode(), new.double() - old.double())
    assert (change.nbytes, change.shape) == (new.nbytes, new.shape)


def test_the_change_is_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = Base(folder(tmp_path / "base", WEIGHTS)), Base(folder(tmp_path / "tuned", tuned()))
    monkeypatch.setattr(Difference, "decode", lambda self: pytest.fail("the difference was made whole"))
    monkeypatch.setattr(Dense, "dense", lambda self: pytest.fail("the delta was made whole"))
    Sparsify(density=0.05)(extracted(model, base).adapter)


def test_what_no_adapter_holds_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SMALL", 64)
    new = tuned(wte__weight=t(60, 16), score__weight=t(2, 16), tower__weight=t(30, 30))
    base, model = Base(folder(tmp_path / "base", WEIGHTS)), Base(folder(tmp_path / "tuned", new))
    change = extracted(model, base)
    assert sorted(change.lost) == ["tower.weight: shape (30, 30), where the base has nothing",
                                   "wte.weight: shape (60, 16), where the base has shape (50, 16)"]
    assert "score.weight" in change.adapter.replaced


def test_models_that_do_not_belong_together_or_are_equal_are_refused(tmp_path: Path) -> None:
    base = Base(folder(tmp_path / "base", WEIGHTS))
    with pytest.raises(FormatError, match="no weight of"):
        extracted(Base(folder(tmp_path / "other", {"x.a.weight": t(3, 3)})), base)
    with pytest.raises(FormatError, match="no matrix of"):
        extracted(Base(folder(tmp_path / "same", WEIGHTS)), base)


def test_models_are_told_from_adapters(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", WEIGHTS)
    assert is_model(model, None)
    assert is_model(model / "model.safetensors", Base(model))
    assert not is_model(model / "model.safetensors", None)
    assert not is_model(model / "config.json", Base(model))
    (model / "adapter_config.json").write_text("{}")
    assert not is_model(model, None)
