"""Intruder dimensions: against decompositions of dense matrices, PEFT's own mitigation, and planted cases."""

from __future__ import annotations

import pytest
import torch

from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import NeedsError, UsageError
from adaptc.factor import decoded
from adaptc.passes import Context
from adaptc.registry import CODECS
from adaptc.spec import parse
from adaptc.squeeze.eigenbase import Spectra, default_folder, left
from adaptc.squeeze.intruders import Shrink, inspect_intruders, leading, shrink
from adaptc.tensorfile import write_tensors

KEY = "model.layers.0.self_attn.q_proj.weight"


def pair(m, n, r, seed=0, size=1.0, scale=0.5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    w0 = torch.randn(m, n, generator=g) @ torch.diag((0.9 if n < 100 else 0.99) ** torch.arange(n).float())
    b, a = torch.randn(m, r, generator=g) * size, torch.randn(r, n, generator=g) / n**0.5
    return w0, LowRank(a.to(dtype), b.to(dtype), None, scale, (m, n))


def dense(w0, delta, top):
    """Cosines, singular values and vectors by decomposing both matrices."""
    u0 = torch.linalg.svd(w0.double(), full_matrices=False).U
    u, s, vh = torch.linalg.svd(w0.double() + delta.dense(), full_matrices=False)
    return (u.mT @ u0).abs().amax(1)[:top], u, s, vh


@pytest.mark.parametrize(("m", "n", "r"), [(48, 32, 4), (32, 48, 4), (40, 40, 6), (36, 32, 8), (400, 30, 3),
                                           (420, 440, 5)])
def test_leading_vectors_match_dense_decompositions(m, n, r):
    w0, delta = pair(m, n, r, size=3.0)
    found = leading(w0, delta, left(w0), 8)
    cosines, u, s, _ = dense(w0, delta, 8)
    torch.testing.assert_close(found.s, s[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cosine, cosines, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((found.u * u[:, :8]).sum(0).abs(), torch.ones(8).double(), rtol=1e-5, atol=0)
    assert found.energy == pytest.approx(float(s.square().sum()), rel=1e-9)


def test_left_vectors_are_those_of_the_weight():
    for shape in ((48, 32), (32, 48)):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        made = left(w)
        u, s, _ = torch.linalg.svd(w.double(), full_matrices=False)
        torch.testing.assert_close(made.s.double(), s, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((made.u.double() * u).sum(0).abs(), torch.ones(32).double(), rtol=1e-4, atol=0)


def planted(scale=0.5, size=60.0, dtype=torch.float32):
    """W0, and a change along an output direction that has 1/sqrt(64) of every singular vector of W0."""
    w0, _ = pair(64, 48, 1)
    u0 = torch.linalg.svd(w0.double()).U
    b = (u0 @ torch.ones(64, 1).double() / 8 * size).to(dtype)
    a = torch.zeros(1, 48, dtype=dtype)
    a[0, 40] = 1.0
    return w0, LowRank(a, b, None, scale, (64, 48))


def test_a_planted_intruder_is_found_and_shrunk():
    w0, delta = planted()
    found = leading(w0, delta, left(w0), 10)
    assert found.intruders(0.5).tolist() == [0]
    assert float(found.cosine[0]) < 0.2
    made = shrink(delta, w0, found, 0.5, 0.75)
    _, u, s, vh = dense(w0, delta, 1)
    want = delta.dense() - 0.25 * s[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(made.dense(), want, rtol=0, atol=1e-5)
    assert made.rank == 2
    assert torch.equal(made.a[:1], delta.a)
    assert torch.equal(made.b[:, :1], delta.b)


def test_without_intruders_nothing_changes():
    w0, delta = pair(32, 32, 2, size=1e-3)
    found = leading(w0, delta, left(w0), 10)
    assert not len(found.intruders(0.5))
    assert shrink(delta, w0, found, 0.5, 0.75) is delta


@pytest.mark.parametrize("scale", [2.0, -0.7])
def test_cores_and_negative_scales_are_kept(scale):
    w0, plain = pair(40, 40, 3, size=9.0, scale=scale)
    delta = LowRank(plain.a, plain.b, torch.eye(3) * 1.5, scale, plain.shape)
    found = leading(w0, delta, left(w0), 10)
    at = found.intruders(0.6)
    assert len(at)
    made = shrink(delta, w0, found, 0.6, 0.25)
    _, u, s, vh = dense(w0, delta, 1)
    want = delta.dense() - 0.75 * (u[:, at] * s[at]) @ vh[at]
    torch.testing.assert_close(made.dense(), want, rtol=0, atol=2e-4)
    assert torch.equal(made.core[:3, :3], delta.core)


@pytest.fixture
def base(tmp_path):
    """A base of two weights, the first with a planted intruder in the adapter that goes with it."""
    w0, delta = planted()
    other, small = pair(32, 48, 2, size=1e-3)
    folder = tmp_path / "base"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as f:
        write_tensors(f, {KEY: w0, KEY.replace("q_proj", "v_proj"): other}, {})
    adapter = Adapter({KEY: delta, KEY.replace("q_proj", "v_proj"): small}, {}, Origin("peft"))
    return Base(folder), adapter, w0


def test_the_pass_measures_what_it_changes_and_leaves_the_rest(base, tmp_path):
    weights, adapter, w0 = base
    ctx = Context(weights, jobs=1, cache=tmp_path / "spectra")
    (step,) = parse("shrink{factor=0.5}")
    outcome = step(adapter, ctx)
    before, after = adapter.deltas[KEY], outcome.adapter.deltas[KEY]
    rows = {r.key: r for r in outcome.rows}
    want = float((after.dense() - before.dense()).norm() / before.dense().norm())
    assert rows[KEY].error == pytest.approx(want, rel=1e-6)
    assert 0.3 < want < 0.6
    assert rows[KEY].note == "1 intruders shrunk"
    other = KEY.replace("q_proj", "v_proj")
    assert outcome.adapter.deltas[other] is adapter.deltas[other]
    shares = [[m.share for m in inspect_intruders(a, ctx, Spectra(ctx.cache))] for a in (adapter, outcome.adapter)]
    s = dense(w0, before, 1)[2]
    assert shares[0][0] == pytest.approx(float(s[0] ** 2 / s.square().sum()), rel=1e-6)
    assert shares[1][0] < shares[0][0]
    assert shares[0][1] == shares[1][1] == 0.0


def test_spectra_are_computed_once_a_content(base, tmp_path):
    weights, adapter, w0 = base
    folder = tmp_path / "spectra"
    ctx = Context(weights, jobs=1, cache=folder)
    first, second = Spectra(folder), Spectra(folder)
    found = [inspect_intruders(adapter, ctx, s) for s in (first, second)]
    assert (first.computed, first.read, second.computed, second.read) == (2, 0, 0, 2)
    assert found[0] == found[1]
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    third = Spectra(folder)
    third.left(w0)
    third.left(w0 + 1)
    assert (third.computed, third.read) == (2, 0)
    third.left(w0)
    assert third.read == 1


def test_the_default_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTC_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "spectra"
    monkeypatch.delenv("ADAPTC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x" / "adaptc" / "spectra"


def test_what_has_no_factors_says_so(base, tmp_path):
    weights, adapter, _ = base
    dora = NeedsBase("dora", {"magnitude": torch.ones(64)}, {}, (64, 48), adapter.deltas[KEY])
    odd = adapter.with_deltas({KEY: dora})
    ctx = Context(weights, jobs=1, cache=tmp_path / "s")
    assert inspect_intruders(odd, ctx, Spectra(ctx.cache))[0].note == "dora is no plain change of the weight"
    assert Shrink()(odd, ctx).adapter.deltas[KEY] is dora


def test_coded_factors_are_decoded_and_shrunk(base, tmp_path):
    weights, adapter, _ = base
    delta = adapter.deltas[KEY]
    coded = LowRank(CODECS.get("affine").encode(delta.a, width=8, group=8), delta.b, None, delta.scale, delta.shape)
    after = Shrink()(adapter.with_deltas({KEY: coded}), Context(weights, jobs=1, cache=tmp_path / "s"))
    made = after.adapter.deltas[KEY]
    assert made.rank == 2
    assert torch.equal(decoded(made.a)[:1], decoded(coded.a))
    assert after.rows[0].note == "1 intruders shrunk"


def test_bad_settings_and_no_base_are_refused(base):
    for options in ({"factor": 1.0}, {"factor": -0.1}, {"cosine": 0.0}, {"top": 0}):
        with pytest.raises(UsageError):
            Shrink(**options)
    with pytest.raises(NeedsError, match="shrink needs base"):
        Shrink()(base[1])


def test_peft_finds_and_shrinks_the_same():
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    w0, delta = planted(scale=2.0, size=12.0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False))
    model[0].weight.data.copy_(w0)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    g = torch.Generator().manual_seed(5)
    layer.lora_A["default"].weight.data.copy_(torch.cat([delta.a, torch.randn(2, 48, generator=g) * 0.1]))
    layer.lora_B["default"].weight.data.copy_(torch.cat([delta.b, torch.randn(64, 2, generator=g)], 1))
    whole = LowRank(layer.lora_A["default"].weight.data.clone(), layer.lora_B["default"].weight.data.clone(), None, 2.0,
                    (64, 48))
    intruders.reduce_intruder_dimension(wrapped, logging_sink=None)
    theirs = layer.get_delta_weight("intruder_reduced").detach().double()
    found = leading(w0, whole, left(w0), 10)
    assert len(found.intruders(0.5))
    made = shrink(whole, w0, found, 0.5, 0.75).dense()
    u, s, vh = torch.linalg.svd(made)
    torch.testing.assert_close((u[:, :3] * s[:3]) @ vh[:3], theirs, rtol=0, atol=2e-4)
