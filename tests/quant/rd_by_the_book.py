"""A slow decoder of rate-distortion codes, written from docs/rd-coding.md and reading its tables there."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rd-coding.md").read_text(encoding="utf8")
LINES = re.findall(r"^    (\d+): ([\d /]+)$", PAGE, re.M)
RATES = [int(r) for r in re.search(r"RATE = ([\d, ]+)", PAGE)[1].split(",")]
NEXT = [[int(x) for x in pair] for pair in re.findall(r"\d:\((\d),(\d)\)", PAGE)]


def frequencies(line, part):
    kmax, parts = LINES[line]
    given = [int(f) for f in parts.split("/")[part].split()]
    return given + [1] * (int(kmax) + 1 - len(given))


def table(line, part):
    f = frequencies(line, part)
    kmax = len(f) - 1
    slots = [0] * 1024
    ordered = [s for s in range(-kmax, kmax + 1) for _ in range(f[abs(s)])]
    for i, s in enumerate(ordered):
        slots[643 * i % 1024] = s
    seen, out = {}, []
    for s in slots:
        x = seen.get(s, f[abs(s)])
        seen[s] = x + 1
        b = 10 - int(math.log2(x))
        out.append((s, b, x * 2**b - 1024))
    return out


TABLES = {(line, part): table(line, part) for line in range(14) for part in range(3)}


class Bits:
    def __init__(self, data):
        self.text = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def read(self, n):
        self.at += n
        return int(self.text[self.at - n : self.at] or "0", 2)

    def rice(self, k):
        one = self.text.index("1", self.at)
        h, self.at = one - self.at, one + 1
        return h * 2**k + self.read(k)

    def signed(self, k):
        z = self.rice(k)
        return z // 2 if z % 2 == 0 else -(z + 1) // 2


def rate(c):
    return RATES[c] if c < 14 else RATES[10 + (c - 14) % 4] + 256 * ((c - 10) // 4)


def streams(m, n):
    if m + n <= 4096:
        return [[("v", 0, n), ("u", 0, m)]]
    return [
        [(side, i * size // parts, (i + 1) * size // parts)]
        for side, size in (("v", n), ("u", m))
        for parts in [math.ceil(size / 4096)]
        for i in range(parts)
    ]


def read_stream(data, runs, classes):
    bits, out = Bits(data), []
    x = bits.read(10)
    total, done = sum(stop - start for _, start, stop in runs), 0
    for side, start, stop in runs:
        c, t = classes[side], 0
        e = 0 if c < 14 else (c - 14) // 4 + 1
        for _ in range(start, stop):
            done += 1
            symbol, b, base = TABLES[(c, t % 2) if e == 0 else (10 + (c - 14) % 4, 2)][x]
            x = base + bits.read(b) if done < total else 0
            k = symbol if e == 0 else symbol * 2**e + bits.read(e) - 2 ** (e - 1)
            out.append(2 * k - (k > 0) * (t % 2) + (k < 0) * (t % 2))
            t = NEXT[t][k % 2]
    assert (bits.at + 7) // 8 == len(data)
    return out


def decode(shapes, index, payload):
    bits = Bits(index)
    precision, pc, pv, pu, pe, pl = (bits.read(4) for _ in range(6))
    v = difference = exponent = 0
    directions = []
    for module, (m, n) in enumerate(shapes):
        count = bits.rice(pc)
        for j in range(count):
            v -= bits.signed(pv)
            difference += bits.signed(pu)
            exponent += bits.signed(pe)
            mantissa = 2**precision + bits.read(precision)
            classes = {"v": v, "u": v + difference}
            lengths = [
                sum((stop - start) * rate(classes[side]) for side, start, stop in runs) // 2048 + 1 + bits.signed(pl)
                for runs in streams(m, n)
            ]
            directions.append((module, classes, mantissa, exponent, lengths))
            if j == 0:
                first = v, exponent
        if count:
            v, exponent = first
    found = {}
    at = 0
    for d in sorted(range(len(directions)), key=lambda d: -sum(directions[d][1].values())):
        module, classes, _, _, lengths = directions[d]
        if at + sum(lengths) > len(payload):
            break
        found[d] = []
        for runs, size in zip(streams(*shapes[module]), lengths, strict=True):
            found[d] += read_stream(payload[at : at + size], runs, classes)
            at += size
    out = []
    for module, (m, n) in enumerate(shapes):
        b, a = np.zeros((m, 0), np.float32), np.zeros((0, n), np.float32)
        for d, (owner, _, mantissa, e, _) in enumerate(directions):
            if owner == module and d in found:
                h = (e + precision) // 2
                p = np.array(found[d][n:], np.float32) * np.float32(math.ldexp(mantissa, e - h))
                q = np.array(found[d][:n], np.float32) * np.float32(math.ldexp(1, h))
                b, a = np.concatenate([b, p[:, None]], 1), np.concatenate([a, q[None]], 0)
        out.append((b, a))
    return out
