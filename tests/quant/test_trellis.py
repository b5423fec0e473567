from __future__ import annotations

import numpy as np
import pytest

from adaptc.quant.allocate import Spectra, fit_classes, for_bits, for_error
from adaptc.quant.rd_tables import BITS, FREQUENCIES, distortion, rate
from adaptc.quant.trellis import NEXT, RATE_PRICE, search, walk


@pytest.mark.parametrize("code", [1, 3, 5, 9, 13])
def test_a_gaussian_source_comes_within_a_decibel_of_the_rate_distortion_bound(code):
    codes = np.full(16, code)
    x = np.random.default_rng(code).standard_normal((1500, 16)).astype(np.float32) * np.float32(2 ** ((code - 1) / 4))
    level = search(x, codes)
    point, grid = walk(level)
    bits = BITS[code][grid, np.abs(level)].mean()
    gain = (x * point).sum() / (point.astype(float) ** 2).sum()
    noise = np.mean((x - gain * point) ** 2) / np.mean(x**2)
    assert 0.3 < 10 * np.log10(noise) + 6.0206 * bits < 0.85  # decibels above the bound
    assert noise == pytest.approx(distortion(codes)[0], rel=0.06)
    assert bits == pytest.approx(rate(codes)[0] / 256, rel=0.03)


def test_the_search_finds_the_cheapest_path_of_all():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 1)).astype(np.float32) * np.float32(1.2)
    code = np.array([3])

    def price(levels):
        level = np.array(levels, np.int16)[:, None]
        point, grid = walk(level)
        return float(((x - point) ** 2).sum() + RATE_PRICE * BITS[3][grid, np.abs(level)].sum())

    every = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 4), -1).reshape(-1, 4)
    assert price(search(x, code)[:, 0]) == pytest.approx(min(map(price, every)), rel=1e-5)


def test_the_walk_follows_the_trellis():
    levels = np.random.default_rng(0).integers(-5, 6, (50, 3))
    point, grid = walk(levels)
    for lane in range(3):
        state = 0
        for k, p, g in zip(levels[:, lane], point[:, lane], grid[:, lane], strict=True):
            assert g == state % 2
            assert p == (2 * k if state % 2 == 0 or k == 0 else 2 * k - np.sign(k))
            state = NEXT[state, k % 2]


def test_frequencies_fill_the_coder():
    for row in FREQUENCIES:
        for f in row:
            assert f[0] + 2 * f[1:].sum() == 1024
            assert f.min() >= 1


def test_outliers_ask_for_a_coarser_class():
    x = np.random.default_rng(0).standard_normal((500, 2))
    x[3, 1] = 30.0
    plain, outlier = fit_classes(x)
    assert plain == 1
    assert outlier > plain


def test_a_bit_budget_is_filled_and_an_error_target_met():
    rng = np.random.default_rng(0)
    spectra = Spectra(np.sort(rng.exponential(1.0, 40))[::-1].copy(), np.full(40, 300), np.full(40, 200))
    for bits in (4e3, 1e4, 5e4):
        found = for_bits(spectra, bits)
        assert 0.97 * bits < found.bits <= bits
    for error in (0.5, 0.1, 0.01):
        assert for_error(spectra, error).error <= error
    assert for_bits(spectra, 10.0).bits <= 10.0
