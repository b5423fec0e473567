from __future__ import annotations

import numpy as np
import pytest

from adaptc.errors import FormatError
from adaptc.quant import tans_native
from adaptc.quant.rd_tables import FINE
from adaptc.quant.tans import Lanes, decode_lanes, encode_lanes, symbols
from adaptc.quant.trellis import search, walk

pytest.importorskip("llvmlite", reason="the native decoder needs llvmlite")


def streams(first, second, split, length, seed=0):
    """Encode random samples of mixed lanes, each on its own: the payload, where its streams lie, and the points."""
    rng = np.random.default_rng(seed)
    data, points = [], []
    for c, d, s, n in zip(first, second, split, length, strict=True):
        rows, raws, true = [], [], []
        for code, steps in ((c, s), (d, n - s)):
            if steps:
                x = (rng.standard_normal((steps, 1)) * 2.0 ** ((code - 1) / 4)).astype(np.float32)
                level = search(x, np.array([code]))
                point, grid = walk(level)
                row, raw = symbols(level, grid, np.array([code]))
                rows, raws, true = [*rows, row], [*raws, raw], [*true, point[:, 0]]
        lane = Lanes(*(np.array([value]) for value in (n, s, c, d)))
        data += encode_lanes(np.concatenate(rows), np.concatenate(raws), lane)
        points.append(np.concatenate(true))
    size = np.array([len(s) for s in data])
    return b"".join(data), np.cumsum(size) - size, size, points


def decoded(monkeypatch, wish, *arguments):
    """Decode as `wish` says: the rows, or the words of the refusal."""
    monkeypatch.setenv("ADAPTC_KERNELS", wish)
    called = []
    inner = tans_native.decode_fine
    monkeypatch.setattr(tans_native, "decode_fine", lambda *a: called.append(1) or inner(*a))
    try:
        return decode_lanes(*arguments)
    except FormatError as error:
        return str(error)
    finally:
        monkeypatch.setattr(tans_native, "decode_fine", inner)
        assert bool(called) == (wish == "native")


def lanes_of(limit, count, longest, seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, longest, count)
    split = np.where(rng.random(count) < 0.3, length, rng.integers(0, length + 1))
    first, second = rng.integers(0, limit, (2, count))
    first[0] = second[0] = 0  # at least one lane for the native code
    return Lanes(length, split, first, second)


@pytest.mark.parametrize(
    ("limit", "count", "longest", "seed"), [(FINE, 67, 90, 0), (38, 60, 70, 1), (FINE, 1, 6, 2), (FINE, 32, 5, 3)]
)
def test_native_code_decodes_what_the_numpy_loop_decodes(monkeypatch, limit, count, longest, seed):
    lanes = lanes_of(limit, count, longest, seed)
    data, origin, size, points = streams(lanes.first, lanes.second, lanes.split, lanes.length, seed)
    naive = decoded(monkeypatch, "naive", data, origin, size, lanes)
    native = decoded(monkeypatch, "native", data, origin, size, lanes)
    for a, b, point in zip(naive, native, points, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, point)


@pytest.mark.parametrize("code", range(FINE))
def test_every_fine_class_over_more_lanes_than_a_thread_takes_at_a_time(monkeypatch, code):
    count = 2 * tans_native._PIECE + 5
    codes, size = np.full(count, code), np.full(count, 41)
    x = (np.random.default_rng(code).standard_normal((41, count)) * 2.0 ** ((code - 1) / 4)).astype(np.float32)
    level = search(x, codes)
    point, grid = walk(level)
    lanes = Lanes(size, size, codes, codes)
    found = encode_lanes(*symbols(level, grid, codes), lanes)
    nbytes = np.array([len(s) for s in found])
    rows = decoded(monkeypatch, "native", b"".join(found), np.cumsum(nbytes) - nbytes, nbytes, lanes)
    np.testing.assert_array_equal(np.stack(rows), point.T)


@pytest.mark.parametrize("seed", range(8))
def test_any_payload_gives_the_same_points_or_the_same_refusal(monkeypatch, seed):
    lanes = lanes_of(FINE, 45, 60, seed)
    data, origin, size, _ = streams(lanes.first, lanes.second, lanes.split, lanes.length, seed)
    rng = np.random.default_rng(seed)
    at = int(rng.integers(0, len(data)))
    broken = [data[:at], rng.bytes(len(data)), b"", data[:at] + b"\xff" * (len(data) - at), b"\xff"]
    for payload in broken:
        results = [decoded(monkeypatch, wish, payload, origin, size, lanes) for wish in ("naive", "native")]
        assert isinstance(results[0], str)
        assert results[0] == results[1]
    far = origin + 10**6  # streams that begin far behind the payload
    results = [decoded(monkeypatch, wish, data, far, size, lanes) for wish in ("naive", "native")]
    assert results[0] == results[1]


def test_random_bytes_decode_alike_to_the_last_bit(monkeypatch):
    lanes = lanes_of(FINE, 50, 80, 9)
    data = np.random.default_rng(9).bytes(300)  # less than the lanes read: windows are clipped at the end
    origin, ends = np.arange(50) * 7, {}
    for wish in ("naive", "native"):
        size = np.zeros(50, np.int64)
        for _ in range(60):  # learn from each refusal where the stream ends
            result = decoded(monkeypatch, wish, data, origin, size, lanes)
            if not isinstance(result, str):
                break
            words = result.split()
            size[int(words[1])] = -(-int(words[5].rstrip(",")) // 8) - origin[int(words[1])]
        ends[wish] = size.tolist(), [row.tolist() for row in result]
    assert ends["naive"] == ends["native"]


def test_small_codes_do_not_pay_for_compiling_and_naive_forbids_it(monkeypatch):
    monkeypatch.delenv("ADAPTC_KERNELS", raising=False)
    assert not tans_native.chosen(np.array([100]))
    assert tans_native.chosen(np.full(1024, 4096))
    assert not tans_native.chosen(np.array([], np.int64))
    monkeypatch.setenv("ADAPTC_KERNELS", "naive")
    assert not tans_native.chosen(np.full(1024, 4096))
    monkeypatch.setenv("ADAPTC_KERNELS", "native")
    assert tans_native.chosen(np.array([100]))
    assert not tans_native.chosen(np.array([1 << 25]))
    monkeypatch.setattr(tans_native, "_compiled", lambda: None)
    assert not tans_native.chosen(np.array([100]))
