"""Decode an adaptc container with numpy alone, from docs/format.md and docs/rd-coding.md: decode_container.py FILE."""
import hashlib
import json
import re
import sys
from itertools import product
from statistics import NormalDist

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "u1"}
LEVELS = np.float32("""-1 -.6961928009986877 -.5250730514526367 -.39491748809814453 -.28444138169288635 -.18477343022823334
  -.09105003625154495 0 .07958029955625534 .16093020141124725 .24611230194568634 .33791524171829224 .44070982933044434
  .5626170039176941 .7229568362236023 1""".split())
STEPS = [(.1 + .9 * (k + .5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for k in range(2**i)]
RATE = 205, 261, 325, 387, 453, 518, 585, 651, 715, 781, 845, 910, 973, 1038
NEXT = (0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)
TABLES = """4:986 16/194 412/780 119,4:888 65/100 459/698 160,5:742 137/56 469 12/612 198 5,5:622 193 5/30 449 45/530 227 17
,6:512 230 22/18 411 86 3/456 244 36,7:432 242 47 3/10 359 130 14/388 246 62 6,8:360 238 77 12/8 312 155 34 3/332 238 87
16,9:302 225 98 29 4/8 264 169 58 12/280 221 108 32 6,11:248 205 118 45 12 2/4 230 160 80 28 6/238 199 119 51 15 3,12:216
183 122 61 24 7/6 189 154 93 45 17 5/200 177 123 67 28 9 2,15:178 157 115 75 41 19 6 2/4 161 143 101 56 26 11 4/168 154
119 77 42 19 7 2,17:146 137 112 80 49 29 15 6 2/6 137 124 97 67 41 21 9 4/144 133 111 81 53 30 15 6 2,20:128 116 98 79 60
39 23 14 5 3/4 113 111 92 69 48 32 18 10 5 2/120 114 100 80 59 40 24 14 7 3,23:106 99 89 74 59 44 32 23 14 8 3 2/4 95 95
84 69 56 39 26 15 11 5 3/100 97 88 76 61 46 33 22 13 8 4 2"""
def table(kmax, text):  # (symbol, bits, base) of each of the 1024 coder states
    f, slots = [*map(int, text.split())] + [1] * kmax, [0] * 1024
    x = {s: f[abs(s)] - 1 for s in range(-kmax, kmax + 1)}
    for i, s in enumerate(s for s in x for _ in range(f[abs(s)])):
        slots[643 * i % 1024] = s
    for s in slots:
        x[s] += 1
        bits = 11 - x[s].bit_length()
        yield s, bits, (x[s] << bits) - 1024
ROWS = [[[*table(int(row.split(":")[0]), f)] for f in row.split(":")[1].split("/")] for row in TABLES.split(",")]
def reader(data):  # functions that read n bits, and a signed or unsigned Rice code
    text, at = "".join(f"{b:08b}" for b in data.tolist()), 0
    def take(n):
        nonlocal at
        at += n
        return int(text[at - n : at] or "0", 2)
    def rice(k, signed=True):
        zeros = text.index("1", at) - at
        take(zeros + 1)
        z = zeros << k | take(k)
        return z if not signed else z >> 1 if z % 2 == 0 else -(z + 1 >> 1)
    return take, rice
def samples(data, runs):  # integer entries of a stream; runs: (class, count)
    take, left = reader(data)[0], sum(count for _, count in runs)
    x = take(10)
    for c, count in runs:
        t, raw, row = 0, max((c - 10) // 4, 0), ROWS[c if c < 14 else 10 + (c - 14) % 4]
        for _ in range(count):
            k, bits, base = row[2 if raw else t % 2][x]
            left -= 1
            x = base + take(bits) if left else x
            k = (k << raw) + take(raw) - (1 << raw >> 1)
            yield 2 * k - ((k > 0) - (k < 0)) * (t % 2)
            t = NEXT[t][k % 2]
def rd(shapes, config, index, payload):
    take, rice = reader(index)
    precision, *ks = (take(4) for _ in range(6))
    found, columns, v, difference, e, at = [], [{} for _ in shapes], 0, 0, 0, 0
    for j, (m, n) in enumerate(shapes):
        for i in range(rice(ks[0], signed=False)):
            v, difference, e = v - rice(ks[1]), difference + rice(ks[2]), e + rice(ks[3])
            u, mantissa, streams, start = v + difference, (1 << precision) + take(precision), [], start if i else (v, e)
            pieces = [[(c, (i + 1) * s // p - i * s // p)] for c, s, p in ((v, n, -(-n // 4096)), (u, m, -(-m // 4096)))
                      for i in range(p)]
            for runs in pieces if m + n > 4096 else [[(v, n), (u, m)]]:
                cost = sum(s * (RATE[c if c < 14 else 10 + (c - 14) % 4] + 256 * max((c - 10) // 4, 0)) for c, s in runs)
                streams.append((runs, cost // 2048 + 1 + rice(ks[4])))
            found.append((-u - v, len(found), j, mantissa, e, streams))
            last = j
        v, e = start if found and found[-1][2] == j else (v, e)
    for _, d, j, mantissa, e, streams in sorted(found):
        if at + sum(length for _, length in streams) > len(payload):
            break
        entries, (m, n), h = [], shapes[j], (e + precision) // 2
        for runs, length in streams:
            entries, at = [*entries, *samples(payload[at : at + length], runs)], at + length
        columns[j][d] = np.float32(entries) * np.float32([2.0**h] * n + [mantissa * 2.0 ** (e - h)] * m)
    return [(np.array([c[d] for d in sorted(c)], "f4").reshape(-1, m + n)[:, n:].T, ...) for (m, n), c in zip(shapes, columns)]
