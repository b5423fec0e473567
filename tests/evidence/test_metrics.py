"""Metrics against figures worked out by hand, the bootstrap against its definition, curves and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptc.errors import UsageError
from adaptc.evidence.bootstrap import Estimate, draws, estimate
from adaptc.evidence.cache import Cache, digest, digest_files, digest_model, digest_tensors
from adaptc.evidence.curve import Bound, Point, aurac, front
from adaptc.evidence.metrics import BINS, METRICS, Observed, available, equal_mass, equal_width, value
from adaptc.evidence.tally import Asked, Said, Tally


def heard(probabilities, labels=None, reference=None, task="classify"):
    """What a tally keeps of rows with these class probabilities."""
    p = torch.tensor(probabilities)
    tally = Tally(len(p), task)
    asked = Asked(torch.arange(len(p)), None if labels is None else torch.tensor(labels))
    tally.add(asked, Said(p.log()), None if reference is None else Said(torch.tensor(reference).log()))
    return tally.observed()


def test_accuracy_nll_kl_and_agreement_by_hand():
    said = heard([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]], [0, 0, 1], [[0.5, 0.5], [0.4, 0.6], [0.25, 0.75]])
    assert value("accuracy", said) == pytest.approx(1 / 3)
    assert value("nll", said) == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.5)) / 3, rel=1e-6)
    kl = [0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3), 0.0,
          0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)]
    assert value("kl", said) == pytest.approx(sum(kl) / 3, rel=1e-6)
    assert value("agreement", said) == pytest.approx(2 / 3)
    assert available(said) == ["accuracy", "nll", "kl", "agreement", "ece", "mce", "ace"]
    assert available(heard([[0.7, 0.3]])) == []


def test_expected_and_maximum_calibration_error_by_hand():
    # confidences .9 (twice, one right), .6 (right): bins of width 1/15 hold them apart
    said = heard([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], [0, 0, 0])
    assert value("ece", said) == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3, rel=1e-6)
    assert value("mce", said) == pytest.approx(0.4, rel=1e-6)


def test_bins_of_equal_width_hold_their_upper_edge():
    table = equal_width(torch.tensor([0.0, 1 / 15, 1 / 15 + 1e-6, 1.0], dtype=torch.float64), torch.ones(4),
                        torch.zeros(4, dtype=torch.long), 1)
    assert table[0, 0, :, 0].nonzero()[:, 0].tolist() == [0, 1, BINS - 1]
    assert table[0, 0, :2, 0].tolist() == [2.0, 1.0]


def test_adaptive_calibration_error_has_equal_bins_per_class():
    g = np.random.default_rng(0)
    p = g.dirichlet([0.6] * 3, 60)
    labels = g.integers(0, 3, 60)
    said = heard(p.tolist(), labels.tolist())
    each = []
    for c in range(3):
        order = np.argsort(p[:, c], kind="stable")
        for bin in np.split(order, BINS):
            each.append(abs((labels[bin] == c).mean() - p[bin, c].mean()))
    assert value("ace", said) == pytest.approx(np.mean(each), rel=1e-6)
    assert (said.bins["adaptive"][:, :, :, 0].sum(1) == 4).all()


def test_equal_mass_takes_fewer_predictions_than_bins():
    table = equal_mass(torch.rand(4, 1), torch.ones(4, 1), torch.arange(4), 4)
    assert table[0, :, :, 0].sum() == 4


def test_perplexity_is_of_the_mean_of_window_losses():
    tally = Tally(2, "lm")
    logits = [torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.2, 0.8]] * 3).log()]
    for unit, rows in enumerate(logits):
        tally.add(Asked(torch.full((len(rows),), unit), torch.zeros(len(rows), dtype=torch.long)), Said(rows), None)
    said = tally.observed()
    assert value("perplexity", said) == pytest.approx(math.exp(-(math.log(0.7) + math.log(0.2)) / 2), rel=1e-6)
    assert value("nll", said) == pytest.approx(-(math.log(0.7) + 3 * math.log(0.2)) / 4, rel=1e-6)


def rows_right(right):
    count = torch.ones(len(right), dtype=torch.float64)
    return Observed({"count": count, "right": torch.tensor(right, dtype=torch.float64)}, {})


def test_draws_count_every_unit_and_repeat_under_a_seed():
    blocks = [torch.cat(list(draws(50, 200, seed))) for seed in (1, 1, 2)]
    assert (blocks[0].sum(1) == 50).all()
    assert torch.equal(blocks[0], blocks[1])
    assert not torch.equal(blocks[0], blocks[2])
    assert blocks[0].shape == (200, 50)


def test_intervals_are_the_percentiles_of_resampled_values():
    said = rows_right([1.0] * 70 + [0.0] * 30)
    (e,) = estimate(["accuracy"], said, resamples=400, seed=3)
    direct = [float((w * said.sums["right"]).sum() / 100) for block in draws(100, 400, 3) for w in block]
    assert (e.low, e.high) == pytest.approx(tuple(np.percentile(direct, [2.5, 97.5])))
    assert e.low < 0.7 < e.high
    assert e.distinguishable is None


def test_a_fraction_of_a_point_on_500_rows_is_not_distinguishable():
    reference = rows_right([1.0] * 440 + [0.0] * 60)
    better = rows_right([0.0] * 7 + [1.0] * 433 + [1.0] * 8 + [0.0] * 52)
    (e,) = estimate(["accuracy"], better, reference)
    assert e.difference == pytest.approx(0.002)
    assert e.distinguishable is False
    far = rows_right([1.0] * 470 + [0.0] * 30)
    (e,) = estimate(["accuracy"], far, reference)
    assert e.distinguishable is True
    assert e.difference_low is not None
    assert e.difference_low > 0


def test_pairing_sees_what_separate_intervals_do_not():
    right = [1.0] * 60 + [0.0] * 40
    (e,) = estimate(["accuracy"], rows_right([*right[:-6], *[1.0] * 6]), rows_right(right))
    assert e.distinguishable is True
    assert e.low < 0.6  # its own interval holds the reference's value


def test_one_unit_has_no_interval_and_unlike_units_do_not_pair():
    (e,) = estimate(["accuracy"], rows_right([1.0]), rows_right([0.0]))
    assert (e.low, e.difference, e.difference_low, e.distinguishable) == (None, 1.0, None, None)
    with pytest.raises(UsageError, match="2 units cannot be paired with 1"):
        estimate(["accuracy"], rows_right([1.0, 0.0]), rows_right([1.0]))


def point(nbytes, **metrics):
    made = {m: {"metric": m, "value": v, "difference": v - 0.9} for m, v in metrics.items()}
    return Point(str(nbytes), f"s{nbytes}", "bits", 1.0, nbytes, 0.1, made)


def test_the_front_keeps_what_nothing_beats():
    points = [point(10, accuracy=0.5), point(20, accuracy=0.8), point(20, accuracy=0.7), point(30, accuracy=0.8),
              point(40, accuracy=0.9)]
    assert [(p.nbytes, p.value("accuracy")) for p in front(points, "accuracy")] == [(10, 0.5), (20, 0.8), (40, 0.9)]
    assert [p.nbytes for p in front([point(10, kl=0.2), point(20, kl=0.3), point(30, kl=0.1)], "kl")] == [10, 30]


def test_aurac_by_hand():
    assert aurac([1, 2, 4], [0.5, 0.7, 0.9]) == pytest.approx((0.6 + 0.8) / 2)
    assert aurac([4, 1, 2], [0.9, 0.5, 0.7], log=False) == pytest.approx((1 * 0.6 + 2 * 0.8) / 3)
    assert aurac([8], [0.7]) == 0.7
    for ranks in ([], [2, 2]):
        with pytest.raises(UsageError):
            aurac(ranks, [0.5] * len(ranks))


@pytest.mark.parametrize(("text", "met"), [("accuracy>0.8", True), ("accuracy>=0.88", True), ("accuracy < .5", False),
                                           ("accuracy_drop<=0.03", True), ("accuracy_drop<0.01", False),
                                           ("accuracy_rise>-0.1", True), ("kl<1e-2", True)])
def test_bounds(text, met):
    bound = Bound.parse(text)
    assert bound.met(point(1, accuracy=0.88, kl=0.004)) is met
    assert Bound.parse(str(bound)) == bound


@pytest.mark.parametrize("text", ["", "kl", "kl=1", "kl<x", "fame<1", "kl_drop<1", "accuracy<1.2.3"])
def test_what_is_no_bound_is_refused(text):
    with pytest.raises(UsageError):
        Bound.parse(text)


def test_the_cache_forgets_what_is_damaged(tmp_path):
    cache = Cache(tmp_path / "c")
    key = digest({"b": 1, "a": [1, 2]})
    assert key == digest({"a": [1, 2], "b": 1}) != digest({"a": [2, 1], "b": 1})
    assert cache.get(key) is None
    cache.put(key, {"point": 3})
    assert cache.get(key)["point"] == 3
    file = cache.folder / f"{key}.json"
    file.rename(cache.folder / "other.json")
    assert cache.get("other") is None
    file.write_text('{"key": ')
    assert cache.get(key) is None


def test_digests_see_content_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(bytes(range(256)) * 20000)
    a, b = (tmp_path / n / "x.safetensors" for n in ("a", "b"))
    assert digest_model(a.parent) == digest_model(b.parent)
    assert digest_files([a]) == digest_files([b])
    raw = bytearray(b.read_bytes())
    raw[-1] ^= 1
    b.write_bytes(raw)
    assert digest_model(a.parent) != digest_model(b.parent)
    assert digest_files([a]) != digest_files([b])
    t = torch.arange(4.0)
    assert digest_tensors({"k": t}) == digest_tensors({"k": t.clone()})
    assert len({digest_tensors(d) for d in ({"k": t}, {"k": t + 1}, {"j": t}, {"k": t.reshape(2, 2)},
                                            {"k": t.half()})}) == 5


def test_every_metric_explains_itself():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert len(metric.about) > 20
    assert Estimate("kl", 0.1).data()["distinguishable"] is None
