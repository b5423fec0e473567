from __future__ import annotations

import numpy as np
import pytest

from adaptc.errors import FormatError
from adaptc.quant.rd_tables import BITS, FINE, rate
from adaptc.quant.tans import Lanes, decode_lanes, encode_lanes, join_bits, symbols
from adaptc.quant.trellis import search, walk


def coded(codes, steps, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((steps, len(codes))) * 2.0 ** ((codes - 1) / 4)).astype(np.float32)
    level = search(x, codes)
    point, grid = walk(level)
    return x, level, point, grid


@pytest.mark.parametrize("code", [0, 3, 7, 13, 14, 21, 37])
def test_streams_come_back_at_the_rate_of_their_entropy(code):
    codes = np.full(6, code)
    _, level, point, grid = coded(codes, 700)
    lanes = Lanes(np.full(6, 700), np.full(6, 700), codes, codes)
    streams = encode_lanes(*symbols(level, grid, codes), lanes)
    size = np.array([len(s) for s in streams])
    rows = decode_lanes(b"".join(streams), np.cumsum(size) - size, size, lanes)
    for row, column in zip(rows, point.T, strict=True):
        np.testing.assert_array_equal(row, column)
    if code < FINE:
        ideal = BITS[code][grid, np.abs(level)].sum()
        assert abs(8 * size.sum() - ideal) < 0.02 * ideal + 16 * 6
    assert abs(8 * size.sum() / level.size - rate(codes)[0] / 256) < 0.12


def test_a_lane_changes_class_at_its_split_and_lanes_of_any_length_mix():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 26, 12), rng.integers(0, 26, 12)
    streams, points, length, split = [], [], [], []
    for i in range(12):
        a, b = 20 + 9 * i, 50 + int(rng.integers(0, 40))
        (_, l1, p1, g1), (_, l2, p2, g2) = coded(first[i : i + 1], a, i), coded(second[i : i + 1], b, 50 + i)
        s1, s2 = symbols(l1, g1, first[i : i + 1]), symbols(l2, g2, second[i : i + 1])
        lane = Lanes(np.array([a + b]), np.array([a]), first[i : i + 1], second[i : i + 1])
        streams += encode_lanes(np.concatenate([s1[0], s2[0]]), np.concatenate([s1[1], s2[1]]), lane)
        points.append(np.concatenate([p1, p2])[:, 0])
        length.append(a + b)
        split.append(a)
    size = np.array([len(s) for s in streams])
    lanes = Lanes(np.array(length), np.array(split), first, second)
    for row, point in zip(decode_lanes(b"".join(streams), np.cumsum(size) - size, size, lanes), points, strict=True):
        np.testing.assert_array_equal(row, point)


def test_a_stream_that_does_not_end_where_it_should_is_refused():
    codes = np.full(1, 5)
    _, level, _, grid = coded(codes, 400)
    lanes = Lanes(np.array([400]), np.array([400]), codes, codes)
    (stream,) = encode_lanes(*symbols(level, grid, codes), lanes)
    with pytest.raises(FormatError, match="not within its last byte"):
        decode_lanes(stream + b"\0", np.array([0]), np.array([len(stream) + 1]), lanes)


def test_bits_join_like_text():
    rng = np.random.default_rng(0)
    width = rng.integers(0, 17, (5, 60)).astype(np.uint8)
    value = (rng.integers(0, 1 << 16, (5, 60)) & ((1 << width.astype(np.int64)) - 1)).astype(np.uint32)
    for row, sizes, data in zip(value.tolist(), width.tolist(), join_bits(value, width), strict=True):
        text = "".join(f"{v:0{w}b}" if w else "" for v, w in zip(row, sizes, strict=True))
        text += "0" * (-len(text) % 8)
        assert data == bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
