"""Entropy coding of trellis levels: tabled asymmetric numeral systems over many lanes at once.

A *lane* is one bit stream: up to two runs of samples, each with the tables of its own class. The coder state X is
0..1023; the first ten bits of a lane give X, then every sample costs one look-up (the symbol, a bit count and a new
base) and that many bits, most significant first. Lanes are independent, so NumPy steps through all of them together;
`tans_native` does the same in compiled code, for large adapters and where llvmlite is installed.
Tabled ANS: Duda 2013, with the spreading step of FSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from adaptc.errors import FormatError
from adaptc.quant import tans_native
from adaptc.quant.rd_tables import FINE, FREQUENCIES, TABLE_BITS, Ints, halvings, table
from adaptc.quant.trellis import NEXT, walk

SIZE = 1 << TABLE_BITS
_STATES = 8 * SIZE  # entries of a class: one table for each trellis state
_SYMBOLS = 64  # columns of a row of symbols: level + 32
_BIAS = 64  # added to a point to store it in seven bits
_BLOCK = 8192  # lanes decoded together
_TILE = 64  # samples decoded before they move to their lanes


@dataclass(frozen=True)
class Lanes:
    """Shape of lanes: `length` samples each, of class `first` before sample `split` and of `second` from there on."""

    length: Ints
    split: Ints
    first: Ints
    second: Ints

    def take(self, index: Ints) -> Lanes:
        """Return the lanes at `index`."""
        return Lanes(self.length[index], self.split[index], self.first[index], self.second[index])


def _spread(frequency: Ints) -> Ints:
    """Assign the 1024 states to symbols -kmax..kmax, in proportion to their frequencies."""
    signed = np.concatenate([frequency[:0:-1], frequency])
    symbols = np.repeat(np.arange(len(signed)), signed)
    out = np.empty(SIZE, np.int64)
    out[np.arange(SIZE) * (SIZE // 2 + SIZE // 8 + 3) % SIZE] = symbols
    return out


def _states(frequency: Ints) -> tuple[Ints, Ints, Ints]:
    """Return symbol, bit count and new base of each of the 1024 states."""
    symbol = _spread(frequency)
    signed = np.concatenate([frequency[:0:-1], frequency])
    order = np.argsort(symbol, kind="stable")
    x = np.empty(SIZE, np.int64)
    x[order] = np.concatenate([np.arange(f, 2 * f) for f in signed])
    bits = TABLE_BITS + 1 - np.frexp(x.astype(np.float64))[1]
    return symbol - (len(frequency) - 1), bits, (x << bits) - SIZE


@cache
def decoding_table() -> npt.NDArray[np.uint32]:
    """Build the look-up of (class, trellis state, X): next base << 11 | bit count << 7 | point + 64.

    Fine classes come first, eight tables each, and the next base names the table of the next trellis state; then come
    the coarse classes, one table each, whose symbol is the leading part of the level.
    """
    out = np.empty((FINE * 8 + 4) * SIZE, np.uint32)
    for code, row in enumerate(FREQUENCIES):
        for state in range(8):
            k, bits, base = _states(row[state & 1])
            base = base + _STATES * code + SIZE * NEXT[state, k & 1].astype(np.int64)
            point = 2 * k - np.sign(k) * (state & 1)
            out[(8 * code + state) * SIZE :][:SIZE] = base << 11 | bits << 7 | (point + _BIAS)
    for octave, row in enumerate(FREQUENCIES[-4:]):
        k, bits, base = _states(row[2])
        at = (8 * FINE + octave) * SIZE
        out[at : at + SIZE] = (base + at) << 11 | bits << 7 | (k + _BIAS)
    return out


def _origin(codes: Ints) -> Ints:
    """Return where the decoding table of each class begins."""
    return np.where(codes < FINE, codes * _STATES, (8 * FINE + table(codes) - (FINE - 4)) * SIZE)


@cache
def _encoding_tables() -> tuple[Ints, Ints, Ints, Ints]:
    """Build what gives a (class, part, symbol) its bit count and next state, where its states begin, and all states.

    A state x in 1024..2047 gives (x + step) >> 16 bits and then moves to states[base + (x >> bits)].
    """
    step = np.zeros((FINE, 3, _SYMBOLS), np.int64)
    base, start = np.zeros((FINE, 3, _SYMBOLS), np.int64), np.zeros((FINE, 3, _SYMBOLS), np.int64)
    state = np.empty((FINE, 3, SIZE), np.int64)
    for code, row in enumerate(FREQUENCIES):
        for part, f in enumerate(row):
            signed = np.concatenate([f[:0:-1], f])
            middle, kmax = _SYMBOLS // 2, len(f) - 1
            bits = TABLE_BITS + 1 - np.frexp(signed.astype(np.float64))[1]
            step[code, part, middle - kmax : middle + kmax + 1] = (bits << 16) - (signed << bits)
            base[code, part, middle - kmax : middle + kmax + 1] = np.cumsum(signed) - 2 * signed
            state[code, part] = np.argsort(_spread(f), kind="stable")
            start[code, part, middle - kmax : middle + kmax + 1] = np.cumsum(signed) - signed
    start += SIZE * np.arange(FINE * 3).reshape(FINE, 3, 1)
    base += SIZE * np.arange(FINE * 3).reshape(FINE, 3, 1)
    return step.ravel(), base.ravel(), start.ravel(), state.ravel() + SIZE


def symbols(
    levels: npt.NDArray[np.int16], grid: npt.NDArray[np.uint8], codes: Ints
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint16]]:
    """Split `levels` (steps, lanes) on their trellis grids into symbols of the tables of class `codes` and raw bits."""
    shift = halvings(codes).astype(np.int16)
    shifted = levels + (1 << shift >> 1).astype(np.int16)
    row = (3 * _SYMBOLS * table(codes) + np.where(shift > 0, 2 * _SYMBOLS, 0) + _SYMBOLS // 2).astype(np.int16)
    fine = (shift == 0).astype(np.int16) * np.int16(_SYMBOLS)
    return row + fine * grid + (shifted >> shift), (shifted & ((1 << shift) - 1)).astype(np.uint16)


def encode_lanes(row: npt.NDArray[np.int16], raw: npt.NDArray[np.uint16], lanes: Lanes) -> list[bytes]:
    """Encode lanes of one length from their `symbols` (steps, lanes): the bytes of every lane."""
    step, base, start, states = _encoding_tables()
    steps, count = row.shape
    value, width = np.empty((steps + 1, count), np.uint32), np.empty((steps + 1, count), np.uint8)
    symbol = row[-1].astype(np.int64)
    x = states.take(start.take(symbol))  # the last sample needs no bits: any state of its symbol will do
    value[steps], width[steps] = 0, 0
    for i in range(steps - 2, -1, -1):
        symbol = row[i].astype(np.int64)
        bits = (x + step.take(symbol)) >> 16
        np.bitwise_and(x, (1 << bits) - 1, out=value[i + 1], casting="unsafe")
        width[i + 1] = bits
        x = states.take(base.take(symbol) + (x >> bits))
    value[0], width[0] = x - SIZE, TABLE_BITS
    if raw.any() or (lanes.first >= FINE).any() or (lanes.second >= FINE).any():
        late = np.arange(steps)[:, None] >= lanes.split
        shift = np.where(late, halvings(lanes.second), halvings(lanes.first)).astype(np.uint8)
        value[1:] = value[1:] << shift | raw
        width[1:] += shift
    return join_bits(value.T, width.T)


def join_bits(value: npt.NDArray[np.uint32], width: npt.NDArray[np.uint8]) -> list[bytes]:
    """Join the `width` low bits of every `value` (streams, fields), most significant first: the bytes of each row."""
    ends = np.cumsum(width, axis=1, dtype=np.int64)
    nbytes = (ends[:, -1] + 7) >> 3
    origin = np.cumsum(nbytes) - nbytes
    first = (ends - width + 8 * origin[:, None]).ravel()
    word = first >> 5
    room = 32 - (first & 31) - width.ravel()  # bits left in the word after this field; negative: it straddles two
    wide = value.ravel().astype(np.int64) << np.where(room > 0, room, 0)
    total = int(nbytes.sum() + 3) // 4 + 2
    over = np.maximum(-room, 0)
    words = np.bincount(word, (wide >> over).astype(np.float64), total)
    split = np.flatnonzero(over)
    tail = (wide[split] & ((1 << over[split]) - 1)) << (32 - over[split])
    words += np.bincount(word[split] + 1, tail.astype(np.float64), total)
    data = words.astype(np.uint32).astype(">u4").tobytes()
    return [data[a : a + n] for a, n in zip(origin.tolist(), nbytes.tolist(), strict=True)]


def decode_lanes(data: bytes, origin: Ints, nbytes: Ints, lanes: Lanes) -> list[npt.NDArray[np.integer]]:
    """Decode the lanes at byte `origin` of `data`: the points of each, int8 or int32.

    Raises:
        FormatError: a lane does not end where its byte count says.
    """
    padded = data + bytes(-len(data) % 2 + 64)
    out: list[npt.NDArray[np.integer]] = [np.empty(0, np.int8)] * len(lanes.length)
    ends, coarse = np.empty(len(out), np.int64), (lanes.first >= FINE) | (lanes.second >= FINE)
    fine = np.flatnonzero(~coarse)
    if native := tans_native.chosen(lanes.length[fine]):
        some = lanes.take(fine)
        fields = (8 * origin[fine], _origin(some.first), _origin(some.second), some.split, some.length)
        rows, ends[fine] = tans_native.decode_fine(np.frombuffer(padded, np.uint8), decoding_table(), fields)
        for lane, found in zip(fine.tolist(), rows, strict=True):
            out[lane] = found
    if not native or coarse.any():
        words = np.frombuffer(padded, ">u2").astype(np.uint32)
        windows = (words[:-1] << np.uint32(16)) | words[1:]
        for block in _blocks(lanes.length, coarse, (True,) if native else (False, True)):
            points, ends[block] = _decode_block(windows, 8 * origin[block], lanes.take(block))
            for lane, row in zip(block.tolist(), points, strict=True):
                out[lane] = row[: lanes.length[lane]]
    wrong = np.flatnonzero(((ends + 7) >> 3) != origin + nbytes)
    if len(wrong):
        raise FormatError(f"stream {wrong[0]} ends at bit {ends[wrong[0]]}, not within its last byte")
    return out


def _blocks(length: Ints, coarse: npt.NDArray[np.bool_], kinds: tuple[bool, ...]) -> list[Ints]:
    """Group lanes for decoding, longest first: the fine ones, the coarse ones, or both, apart from each other."""
    out = []
    for kind in kinds:
        lane = np.flatnonzero(coarse == kind)
        lane = lane[np.argsort(-length[lane], kind="stable")]
        out += [lane[i : i + _BLOCK] for i in range(0, len(lane), _BLOCK)]
    return out


def _decode_block(
    windows: npt.NDArray[np.uint32], start: Ints, lanes: Lanes
) -> tuple[npt.NDArray[np.integer], Ints]:
    """Decode lanes sorted by falling length: points (lanes, steps) and the bit where each lane ends."""
    look_up = decoding_table()
    count, steps = len(start), int(lanes.length[0])
    shifts = np.stack([halvings(lanes.first), halvings(lanes.second)]).astype(np.uint32)
    coarse = bool(shifts.any())
    switches = {int(at): np.flatnonzero(lanes.split == at) for at in np.unique(lanes.split)}
    active = np.searchsorted(-lanes.length, -np.arange(steps), side="left").tolist()
    ends = np.empty(count, np.int64)
    finish = {int(at): np.flatnonzero(lanes.length == at) for at in np.unique(lanes.length)}

    at = start.astype(np.uint32)
    index = at.astype(np.int64) >> 4
    x = (windows.take(index, mode="clip") << (at & 15)) >> (32 - TABLE_BITS)
    at += TABLE_BITS
    state = x.astype(np.int64) + _origin(lanes.first)
    symbol = np.empty((_TILE, count), np.uint8)
    points = np.zeros((count, steps), np.int8)
    raw = np.empty((steps, count) if coarse else (0, 0), np.uint16)
    shift = shifts[0].copy()
    entry, word, bits = np.empty(count, np.uint32), np.empty(count, np.uint32), np.empty(count, np.uint32)
    for i in range(steps):
        n = active[i]
        if i in switches:
            lane = switches[i]
            state[lane] = (state[lane] & (SIZE - 1)) + _origin(lanes.second[lane])
            shift[lane] = shifts[1, lane]
        e, w, b, j, s, a = entry[:n], word[:n], bits[:n], index[:n], state[:n], at[:n]
        look_up.take(s, out=e, mode="clip")
        symbol[i % _TILE, :n] = e
        np.right_shift(a, 4, out=b)
        np.copyto(j, b)  # a cast of its own is faster than one inside the operation
        windows.take(j, out=w, mode="clip")
        np.bitwise_and(a, 15, out=b)
        np.left_shift(w, b, out=w)
        np.right_shift(e, 7, out=b)
        np.bitwise_and(b, 15, out=b)
        if i + 1 in finish:  # the last sample of a lane reads no bits of the next state
            b[finish[i + 1]] = 0
        if coarse:
            b += shift[:n]
        np.add(a, b, out=a)
        if i + 1 in finish:
            ends[finish[i + 1]] = a[finish[i + 1]]
        np.subtract(32, b, out=b)
        np.right_shift(w, b, out=w)
        if coarse:
            np.bitwise_and(w, (1 << shift[:n]) - 1, out=raw[i, :n], casting="unsafe")
            np.right_shift(w, shift[:n], out=w)
        np.right_shift(e, 11, out=e)
        np.add(e, w, out=e)
        np.copyto(s, e)
        if i % _TILE == _TILE - 1 or i + 1 == steps:  # turn a tile round while it is in the cache
            first = i - i % _TILE
            tile = symbol[: i + 1 - first] & np.uint8(127)
            points[:, first : i + 1] = tile.T
    points -= np.int8(_BIAS)
    if coarse:
        return _refine(points, raw, lanes, shifts), ends
    return points, ends


def _refine(
    leading: npt.NDArray[np.int8], raw: npt.NDArray[np.uint16], lanes: Lanes, shifts: npt.NDArray[np.uint32]
) -> npt.NDArray[np.int32]:
    """Turn leading parts (lanes, steps) and raw bits (steps, lanes) of coarse runs into points; fine runs are that."""
    out = leading.astype(np.int32)
    for run, (begin, end) in enumerate(((np.zeros_like(lanes.split), lanes.split), (lanes.split, lanes.length))):
        for first, stop in {(int(a), int(b)) for a, b in zip(begin, end, strict=True)}:
            lane = np.flatnonzero((begin == first) & (end == stop) & (shifts[run] > 0))
            if len(lane) and first < stop:
                shift = shifts[run, lane].astype(np.int32)
                level = (out[lane, first:stop].T << shift) + raw[first:stop, lane] - (1 << shift >> 1)
                out[lane, first:stop] = walk(level)[0].T
    return out
