"""Gradient importance: identities against dL/dW, the same scores in every gauge, averages over batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import SCALE, drawn, lora, text, write_model, write_rows
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from adaptc.calibration import Calibration
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.evidence.calibrate import calibrate
from adaptc.evidence.calibrate_request import Request
from adaptc.evidence.gradients import balanced, scores
from adaptc.evidence.model import load_model
from adaptc.evidence.passages import batches, read_passages, split_passages
from adaptc.evidence.rows import read_rows

pytest.importorskip("transformers")
def layer(c: float = 1.0) -> tuple[Tensor, ...]:
    """Return weight, b, a of a layer with its scale inside, in a gauge of c, and dL/dM for a loss of tanh outputs."""
    w, b, a, x = drawn(9, 7, seed=1), drawn(9, 3, seed=2) * c * SCALE, drawn(3, 7, seed=3) / c, drawn(20, 7, seed=4)
    m = (w + b @ a).requires_grad_(True)
    (g,) = torch.autograd.grad(linear(x, m).tanh().square().sum(), m)
    return w, b, a, x, g


def test_gradients_at_the_factors_and_the_estimate() -> None:
    w, b, a, x, g = layer()
    raw_b, raw_a = (b / SCALE).requires_grad_(True), a.clone().requires_grad_(True)
    loss = linear(x, w + SCALE * raw_b @ raw_a).tanh().square().sum()
    gb, ga = torch.autograd.grad(loss, (raw_b, raw_a))
    assert torch.allclose(ga, SCALE * raw_b.mT @ g)
    assert torch.allclose(gb, SCALE * g @ raw_a.mT)
    gb, ga = g @ a.mT, b.mT @ g
    estimate = gb @ a + b @ ga - gb @ ga
    assert torch.allclose(estimate, b @ a - (b - gb) @ (a - ga))  # what one step of descent takes from b a
    product = estimate * (w + b @ a)
    found = scores(w, b, a, gb, ga)
    for have, want in ((found.rows, product.abs().sum(1)), (found.cols, product.abs().sum(0)),
                       (found.rows2, product.square().sum(1)), (found.cols2, product.square().sum(0))):
        assert torch.allclose(have, want, rtol=1e-12)


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, b, a, _, g = layer()
    whole = scores(w, b, a, g @ a.mT, b.mT @ g)
    monkeypatch.setattr("adaptc.evidence.gradients._BLOCK", 15)
    for x, y in zip(vars(whole).values(), vars(scores(w, b, a, g @ a.mT, b.mT @ g)).values(), strict=True):
        assert torch.allclose(x, y, rtol=1e-13)


def test_balanced_factors() -> None:
    _, b, a, _, _ = layer(c=30.0)
    u, v = balanced(b, a)
    assert torch.allclose(u @ v, b @ a, rtol=1e-12)
    assert torch.allclose(u.mT @ u, v @ v.mT, atol=1e-12)
    wide = balanced(drawn(4, 6, seed=5), drawn(6, 9, seed=6))
    assert torch.allclose(wide[0] @ wide[1], drawn(4, 6, seed=5) @ drawn(6, 9, seed=6))
    zero = balanced(torch.zeros(4, 2), drawn(2, 5, seed=6))
    assert not (zero[0] @ zero[1]).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "llama", "llama")
    write_model(root / "gpt2", "gpt2")
    write_model(root / "bert", "bert", "classify")
    (root / "text.txt").write_text(text(200, 1))
    write_rows(root / "rows.tsv", 30)
    return root


LLAMA = {"model.layers.0.self_attn.q_proj.weight": (16, 16), "model.layers.1.mlp.down_proj.weight": (16, 24)}
GPT2 = {"transformer.h.0.attn.c_attn.weight": (48, 16), "transformer.h.1.mlp.c_proj.weight": (16, 64)}


@pytest.mark.parametrize(("family", "keys"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_averages_over_batches_are_those_of_true_gradients(family: str, keys: dict[str, tuple[int, int]],
                                                           folder: Path, tmp_path: Path) -> None:
    adapter = lora(keys)
    asked = Request(str(folder / family), folder / "text.txt", window=16, batch=3, gradients=True)
    report = calibrate(asked, tmp_path / "s", adapter)
    stats = Calibration(tmp_path / "s")
    loaded = load_model(folder / family, "lm")
    merged = {k: loaded.model.get_parameter(k) for k in keys}
    flip = family == "gpt2"  # Conv1D stores (in, out)
    for key, weight in merged.items():
        delta = adapter.deltas[key].dense().float()
        weight.data += delta.T if flip else delta
        weight.requires_grad_(True)
    rows = read_passages(read_rows(asked.data), loaded.tokenizer, "lm", 16, None)
    train, _ = split_passages(rows, 0.1)
    expected = {k: torch.zeros(m, dtype=torch.float64) for k, (m, _) in keys.items()}
    steps = batches(train, 3, 0)
    for batch in steps:
        logits = loaded.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        kept = batch.mask[:, 1:]
        loss = cross_entropy(logits[:, :-1][kept], batch.ids[:, 1:][kept])
        grads = torch.autograd.grad(loss, list(merged.values()))
        for (key, weight), g in zip(merged.items(), grads, strict=True):
            g, m = (g.T.double(), weight.detach().T.double()) if flip else (g.double(), weight.detach().double())
            b, a = balanced(*adapter.deltas[key].factors())  # type: ignore[union-attr]
            gb, ga = g @ a.mT, b.mT @ g
            now = ((gb @ a + b @ ga - gb @ ga) * m).abs().sum(1)
            expected[key] = 0.9 * expected[key] + 0.1 * now
    assert report.about["gradients"] == {"steps": len(steps), "skipped": 0, "keep": 0.9}
    for key, shape in keys.items():
        found = stats.gradient(key, shape)
        assert found is not None
        assert torch.allclose(found.rows, expected[key], rtol=1e-4, atol=1e-6 * float(expected[key].max()))
        assert float(found.cols.sum()) == pytest.approx(float(found.rows.sum()), rel=1e-5)
    assert sum(s.importance for s in report.layers) == len(keys)


def test_scores_are_the_same_in_every_gauge(folder: Path, tmp_path: Path) -> None:
    asked = Request(str(folder / "bert"), folder / "rows.tsv", task="classify", window=16, batch=8, gradients=True)
    keys = {"bert.encoder.layer.0.attention.self.query.weight": (16, 16),
            "bert.encoder.layer.1.output.dense.weight": (16, 24)}
    for c in (1.0, 8.0):
        calibrate(asked, tmp_path / f"{c}", lora(keys, c))
    one, other = Calibration(tmp_path / "1.0"), Calibration(tmp_path / "8.0")
    for key in keys:
        x, y = one.gradient(key), other.gradient(key)
        assert x is not None
        assert y is not None
        for p, q in zip(vars(x).values(), vars(y).values(), strict=True):
            assert float((p - q).norm() / p.norm()) < 1e-5


def test_moments_are_those_of_the_adapted_model_either_way(folder: Path, tmp_path: Path) -> None:
    asked = Request(str(folder / "llama"), folder / "text.txt", window=16)
    calibrate(asked, tmp_path / "plain")
    calibrate(asked, tmp_path / "attached", lora(LLAMA))
    calibrate(replace(asked, gradients=True), tmp_path / "beside", lora(LLAMA))
    plain, attached, beside = (Calibration(tmp_path / n) for n in ("plain", "attached", "beside"))
    last = "model.layers.1.mlp.down_proj.weight"
    x, y, z = (s.gram(last, 24) for s in (attached, beside, plain))
    assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(x.max()))
    assert not torch.allclose(x, z, rtol=1e-2, atol=1e-3 * float(x.max()))


def test_losses_that_cannot_be_had(folder: Path, tmp_path: Path) -> None:
    asked = Request(str(folder / "bert"), folder / "rows.tsv", window=16, gradients=True)
    keys = {"bert.encoder.layer.0.attention.self.query.weight": (16, 16)}
    with pytest.raises(UsageError, match="embed has none"):
        calibrate(replace(asked, task="embed"), tmp_path / "s", lora(keys))
    (tmp_path / "bad.tsv").write_text("w1 w2\t0\nw3 w4\t7\n")
    with pytest.raises(FormatError, match="has label 7, the classifier has 3 classes"):
        calibrate(replace(asked, task="classify", data=tmp_path / "bad.tsv", held_out=0.0), tmp_path / "s", lora(keys))
    with pytest.raises(NeedsError, match="no low-rank factors on the layers"):
        calibrate(replace(asked, task="classify", exclude=("query",)), tmp_path / "s", lora(keys))
    with pytest.raises(NeedsError, match="classifier would be random"):
        calibrate(Request(str(folder / "llama"), folder / "rows.tsv", task="classify", window=16, gradients=True),
                  tmp_path / "s", lora(LLAMA))
    with pytest.raises(FormatError, match=r"shape \(16, 15\), the layer has \(16, 16\)"):
        calibrate(replace(asked, task="classify"), tmp_path / "s", lora({next(iter(keys)): (16, 15)}))
