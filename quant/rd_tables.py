"""The frozen code tables of rate-distortion coding: level frequencies out of 1024, by class of the signal.

Class c < FINE serves samples with standard deviation 2^((c - 1)/4) steps; a class above reuses the tables of the top
octave and sends one more low bit of every level raw for each octave. Each line of `_TABLES` is a class: kmax, then the
frequencies of |k| = 0, 1, 2, ... in the even grid / in the odd grid / of the leading part of a level with raw bits (k
and -k have the listed frequency each; frequencies of 1 at the end, up to kmax, are left out). Trained on a Gaussian
source coded by `adaptc.quant.trellis`. They are part of the byte format: another table set is another codec id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

TABLE_BITS = 10
FINE = 14
_TABLES = """
4: 986 16 / 194 412 / 780 119
4: 888 65 / 100 459 / 698 160
5: 742 137 / 56 469 12 / 612 198 5
5: 622 193 5 / 30 449 45 / 530 227 17
6: 512 230 22 / 18 411 86 3 / 456 244 36
7: 432 242 47 3 / 10 359 130 14 / 388 246 62 6
8: 360 238 77 12 / 8 312 155 34 3 / 332 238 87 16
9: 302 225 98 29 4 / 8 264 169 58 12 / 280 221 108 32 6
11: 248 205 118 45 12 2 / 4 230 160 80 28 6 / 238 199 119 51 15 3
12: 216 183 122 61 24 7 / 6 189 154 93 45 17 5 / 200 177 123 67 28 9 2
15: 178 157 115 75 41 19 6 2 / 4 161 143 101 56 26 11 4 / 168 154 119 77 42 19 7 2
17: 146 137 112 80 49 29 15 6 2 / 6 137 124 97 67 41 21 9 4 / 144 133 111 81 53 30 15 6 2
20: 128 116 98 79 60 39 23 14 5 3 / 4 113 111 92 69 48 32 18 10 5 2 / 120 114 100 80 59 40 24 14 7 3
23: 106 99 89 74 59 44 32 23 14 8 3 2 / 4 95 95 84 69 56 39 26 15 11 5 3 / 100 97 88 76 61 46 33 22 13 8 4 2
"""
# Expected bits a sample (part of the format: it predicts stream lengths) and relative squared error after the best gain
RATE_256 = (205, 261, 325, 387, 453, 518, 585, 651, 715, 781, 845, 910, 973, 1038)
_DISTORTION = (.394, .285, .199, .141, .0978, .0685, .0474, .0332, .0233, .0163, .0115, .00809, .00574, .00404)



def _line(text: str) -> tuple[Ints, ...]:
    kmax, parts = text.split(":")
    given = [[int(f) for f in part.split()] for part in parts.split("/")]
    return tuple(np.array(f + [1] * (int(kmax) + 1 - len(f)), np.int64) for f in given)


FREQUENCIES = tuple(_line(text) for text in _TABLES.strip().splitlines())
KMAX = np.array([len(row[0]) - 1 for row in FREQUENCIES])
BITS = np.full((FINE, 3, int(KMAX.max()) + 1), 1e6, np.float32)  # code length of level +-k
for _class, _row in enumerate(FREQUENCIES):
    for _grid, _frequency in enumerate(_row):
        BITS[_class, _grid, : len(_frequency)] = TABLE_BITS - np.log2(_frequency)


def table(codes: Ints) -> Ints:
    """Return the line of `_TABLES` that each class uses."""
    return np.minimum(codes, FINE - 4 + (codes - FINE) % 4)


def halvings(codes: Ints) -> Ints:
    """Count the low bits of a level that each class stores raw: none below `FINE`, one more for each octave above."""
    return np.maximum((codes - FINE) // 4 + 1, 0)


def rate(codes: Ints) -> Ints:
    """Return the expected bits of a sample of each class, in 256ths."""
    return np.array(RATE_256)[table(codes)] + 256 * halvings(codes)


def distortion(codes: Ints) -> npt.NDArray[np.float64]:
    """Return the expected relative squared error of each class, after the best gain."""
    out: npt.NDArray[np.float64] = np.array(_DISTORTION)[table(codes)] / 4.0 ** halvings(codes)
    return out
