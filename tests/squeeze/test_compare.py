"""compare against plain dense algebra, and its limits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from merging import KEY, adapter, dense, inputs, lora, refactored

from adaptc.delta import LowRank
from adaptc.errors import FormatError
from adaptc.passes import Context
from adaptc.squeeze.compare import compare


def test_equals_dense_algebra() -> None:
    adapters = inputs(70, 50, (4, 6, 3))
    found = compare(adapters, ("a", "b", "c"))
    module = found.modules[0]
    ws = [dense(a) for a in adapters]
    assert module.norms == pytest.approx([np.linalg.norm(w) for w in ws])
    assert module.ranks == (4, 6, 3)
    for (i, j), pair in module.pairs.items():
        x, y = ws[i], ws[j]
        assert pair.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
        assert pair.conflict == pytest.approx((np.sign(x) != np.sign(y)).mean(), abs=1e-12)
        for got, shared, p, q in ((pair.output, pair.shared_output, x, y), (pair.input, pair.shared_input, x.T, y.T)):
            u, v = (scipy.linalg.orth(w, rcond=1e-10) for w in (p, q))
            angles = np.cos(scipy.linalg.subspace_angles(u, v))[::-1]
            assert np.allclose(got, angles, atol=1e-7)
            assert shared == pytest.approx((angles**2).mean(), abs=1e-7)
        assert found.totals[i, j].cosine == pytest.approx(pair.cosine)


def test_does_not_depend_on_the_factors_but_on_the_deltas() -> None:
    a, b = inputs(40, 30, (4, 5))
    one, two = (compare(x, ("a", "b")).totals[0, 1] for x in ([a, b], [refactored(a, 1), refactored(b, 2)]))
    assert one.cosine == pytest.approx(two.cosine, abs=1e-10)
    assert one.shared_input == pytest.approx(two.shared_input, abs=1e-10)
    assert one.conflict == two.conflict


def test_of_an_adapter_with_itself_and_its_negative() -> None:
    a = inputs(40, 30, (4,))[0]
    negative = a.map(lambda k, d: LowRank(d.a, d.b, None, -d.scale, d.shape))  # type: ignore[union-attr]
    found = compare([a, a, negative], ("a", "again", "negative"))
    same, opposite = found.totals[0, 1], found.totals[0, 2]
    assert (same.cosine, same.conflict) == (pytest.approx(1.0), 0.0)
    assert (opposite.cosine, opposite.conflict) == (pytest.approx(-1.0), 1.0)
    assert [same.shared_output, opposite.shared_output] == pytest.approx([1.0, 1.0])


def test_totals_count_missing_parameters_in_the_norms() -> None:
    other = "model.layers.1.self_attn.q_proj.weight"
    a = adapter({KEY: lora(20, 20, 2, 1), other: lora(20, 20, 2, 2)})
    b = adapter({KEY: lora(20, 20, 2, 1)})
    found = compare([a, b], ("a", "b"), Context(jobs=2))
    x = np.concatenate([dense(a).ravel(), dense(a, other).ravel()])
    y = np.concatenate([dense(b).ravel(), np.zeros(400)])
    assert found.totals[0, 1].cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert (0, 1) not in found.modules[1].pairs
    assert found.notes == ("b lacks 1 of 2 parameters, they count as zero",)


def test_tall_deltas_are_counted_on_evenly_spaced_rows() -> None:
    a, b = (adapter(lora(1500, 16, 3, s)) for s in (1, 2))
    rows = np.round(np.linspace(0, 1499, 512)).astype(int)
    x, y = dense(a)[rows], dense(b)[rows]
    conflict = compare([a, b], ("a", "b")).totals[0, 1].conflict
    assert conflict == pytest.approx((np.sign(x) != np.sign(y)).mean(), abs=2e-4)


def test_experts_count_as_one_long_delta() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (adapter(LowRank(torch.randn(3, 2, 10, generator=g), torch.randn(3, 14, 2, generator=g), None, 1.0,
                            (3, 14, 10))) for _ in range(2))
    found = compare([a, b], ("a", "b"))
    x, y = dense(a), dense(b)
    assert found.totals[0, 1].cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert len(found.modules[0].pairs[0, 1].output) == 6


def test_adapters_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(FormatError, match="shape 20x20 in a, 24x20 in b"):
        compare([adapter(lora(20, 20, 2, 1)), adapter(lora(24, 20, 2, 1))], ("a", "b"))


def test_everything_is_json() -> None:
    from adaptc.cli.compare import _data

    found = compare(inputs(20, 20, (2, 2)), ("a", "b"))
    data = json.loads(json.dumps(_data(found)))
    assert data["total"][0]["pair"] == ["a", "b"]
    assert len(data["modules"][0]["pairs"][0]["output_cosines"]) == 2
