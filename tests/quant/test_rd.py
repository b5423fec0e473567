from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.quant.rd import Budget, Module, RDCode, cut, decode, encode
from tests.quant import rd_by_the_book


def adapter(seed=0, shapes=((96, 64, 8), (48, 160, 6), (64, 64, 16)), decay=0.8):
    rng = np.random.default_rng(seed)
    out = {}
    for i, (m, n, r) in enumerate(shapes):
        s = np.arange(1, r + 1.0) ** -decay * (i + 1)
        out[f"m{i}"] = Module(rng.standard_normal((m, r)) * s, rng.standard_normal((r, n)), 0.5)
    return out


def error(modules, factors, weights=None):
    """Relative error of the deltas, formed densely."""
    left = total = 0.0
    for name, module in modules.items():
        w = 1.0 if weights is None else weights[name]
        dense = module.scale * module.b @ module.a
        b, a = factors[name]
        left += w * w * np.sum((dense - b.astype(np.float64) @ a) ** 2)
        total += w * w * np.sum(dense**2)
    return np.sqrt(left / total)


def params(modules):
    return sum(m.b.size + m.a.size for m in modules.values())


@pytest.mark.parametrize("bits", [0.4, 1.0, 3.0, 6.5])
def test_an_independent_decoder_agrees_bit_for_bit(bits):
    modules = adapter()
    modules["zero"] = Module(np.zeros((8, 2)), np.ones((2, 8)))
    code = encode(modules, Budget(bits_per_param=bits))
    ours, theirs = decode(code), rd_by_the_book.decode(list(code.shapes.values()), code.index, code.payload)
    assert sum(a.shape[0] for _, a in theirs) > 0
    for name, (b, a) in zip(modules, theirs, strict=True):
        np.testing.assert_array_equal(ours[name][0], b)
        np.testing.assert_array_equal(ours[name][1], a)


def test_long_vectors_are_cut_into_streams_and_agree():
    modules = adapter(3, ((4200, 40, 2), (30, 5000, 2)))
    code = encode(modules, Budget(bits_per_param=2.0))
    theirs = rd_by_the_book.decode(list(code.shapes.values()), code.index, code.payload)
    for (b, a), (b2, a2) in zip(decode(code).values(), theirs, strict=True):
        np.testing.assert_array_equal(b, b2)
        np.testing.assert_array_equal(a, a2)
    assert error(modules, decode(code)) < 0.35


@pytest.mark.parametrize("bits", [0.25, 0.5, 1.0, 1.5, 2.0, 4.0])
def test_budget_is_filled_and_never_exceeded(bits):
    modules = adapter()
    code = encode(modules, Budget(bits_per_param=bits))
    limit = int(bits * params(modules) / 8)
    assert 0.95 * limit <= code.nbytes <= limit


def test_more_bits_are_never_worse():
    modules = adapter(1)
    errors = [error(modules, decode(encode(modules, Budget(bits_per_param=b)))) for b in (0.5, 1, 2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03


def test_error_halves_with_each_bit_and_beats_scalar_quantization_on_flat_spectra():
    rng = np.random.default_rng(5)
    b, a = (np.linalg.qr(rng.standard_normal((1024, 8)))[0] for _ in range(2))
    modules = {"flat": Module(b, a.T)}
    for bits in (2, 3, 4):
        measured = error(modules, decode(encode(modules, Budget(bits_per_param=bits))))
        bound = np.sqrt(1 - (1 - 4.0**-bits) ** 2)  # both sides at the Gaussian rate-distortion bound
        assert bound * 0.9 < measured < bound * 1.11  # scalar entropy coding: 1.19; Lloyd-Max: 1.37 and more


@pytest.mark.parametrize("limit", [0.5, 0.2, 0.05])
def test_error_limit_is_met_and_not_wasted(limit):
    modules = adapter(2)
    found = error(modules, decode(encode(modules, Budget(max_error=limit))))
    assert 0.9 * limit < found <= limit


def test_weights_move_error_away_from_heavy_modules():
    modules = adapter(4, ((64, 64, 8), (64, 64, 8)), decay=0.5)
    heavy = {"m0": 6.0, "m1": 1.0}
    plain, weighted = (decode(encode(modules, Budget(bits_per_param=1.5), w)) for w in (None, heavy))
    assert error(modules, weighted, heavy) < 0.8 * error(modules, plain, heavy)
    assert error(modules, weighted) > error(modules, plain)


def test_every_prefix_decodes_and_the_error_falls_with_its_length():
    modules = adapter()
    code = encode(modules, Budget(bits_per_param=2.0))
    errors = []
    for nbytes in np.linspace(0, len(code.payload), 23).astype(int):
        errors.append(error(modules, decode(RDCode(code.shapes, code.index, code.payload[:nbytes]))))
    assert errors[0] == 1.0
    assert all(later <= earlier * 1.02 for earlier, later in pairwise(errors))
    assert errors[len(errors) // 2] < 0.75


def test_cut_fits_and_equals_the_prefix():
    modules = adapter()
    code = encode(modules, Budget(bits_per_param=2.0))
    for nbytes in (0, 60, 300, 700, code.nbytes):
        small = cut(code, nbytes)
        assert small.nbytes <= max(nbytes, 8)
        prefix = decode(RDCode(code.shapes, code.index, small.payload))
        for name, (b, a) in decode(small).items():
            np.testing.assert_array_equal(b, prefix[name][0])
            np.testing.assert_array_equal(a, prefix[name][1])
    assert cut(code, code.nbytes) is code


def test_encoding_is_deterministic():
    first, second = (encode(adapter(), Budget(bits_per_param=1.0)) for _ in range(2))
    assert (first.index, first.payload) == (second.index, second.payload)


def test_scale_enters_the_delta_and_outliers_survive():
    rng = np.random.default_rng(0)
    b = rng.standard_normal((200, 1))
    b[7] = 12.0  # twelve deviations
    modules = {"m": Module(b, rng.standard_normal((1, 200)), -3.0)}
    assert error(modules, decode(encode(modules, Budget(bits_per_param=3.0)))) < 0.25


def test_rank_above_the_shape_and_single_directions_work():
    rng = np.random.default_rng(0)
    modules = {
        "wide": Module(rng.standard_normal((24, 40)), rng.standard_normal((40, 17))),
        "one": Module(rng.standard_normal((1, 1)) * 20, rng.standard_normal((1, 300))),
    }
    factors = decode(encode(modules, Budget(bits_per_param=4.0)))
    assert factors["wide"][1].shape[0] <= 17
    assert error(modules, factors) < 0.05


def test_a_budget_too_small_for_one_direction_gives_the_zero_delta():
    modules = adapter()
    code = encode(modules, Budget(nbytes=12))
    assert code.nbytes <= 12
    assert all(a.shape[0] == 0 for _, a in decode(code).values())


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="exactly one"):
        Budget(bits_per_param=1.0, nbytes=3)
    with pytest.raises(UsageError, match="exactly one"):
        Budget(nbytes=0)
    with pytest.raises(FormatError, match="non-finite"):
        encode({"m": Module(np.full((4, 1), np.nan), np.ones((1, 4)))}, Budget(bits_per_param=1.0))
    code = encode(adapter(), Budget(bits_per_param=1.0))
    with pytest.raises(FormatError, match="accounts for"):
        decode(RDCode(code.shapes, code.index, code.payload + b"\0"))
    with pytest.raises(AdaptcError, match="index"):
        decode(RDCode(code.shapes, code.index[:-3], code.payload))


SMALL = encode(adapter(0, ((40, 24, 3), (24, 40, 3))), Budget(bits_per_param=1.5))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_damaged_codes_decode_or_fail_cleanly(data):
    code = SMALL
    index, payload = bytearray(code.index), bytearray(code.payload)
    for part in (index, payload):
        for _ in range(data.draw(st.integers(0, 3))):
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    try:
        factors = decode(RDCode(code.shapes, bytes(index), bytes(payload)))
    except AdaptcError:
        return
    assert all(np.isfinite(b).all() and np.isfinite(a).all() for b, a in factors.values())
