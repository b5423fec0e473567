"""Decode codes of single factors with numpy alone, written from docs/format.md."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "I64": "<i8",
         "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"}
LEVELS = np.float32([
    -1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635, -.18477343022823334,
    -.09105003625154495, 0, .07958029955625534, .16093020141124725, .24611230194568634, .33791524171829224,
    .44070982933044434, .5626170039176941, .7229568362236023, 1])
STEPS = [(.1 + .9 * (k + .5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for k in range(2**i)]
MAP = np.float32(sorted([0, 1, *STEPS, *(-s for s in STEPS)]))


def widened(x, dtype):
    """Return stored values of a float type that numpy lacks in one it has."""
    if dtype == "BF16":
        return (x.astype("<u4") << 16).view("<f4")
    if dtype == "F8_E5M2":
        return (x.astype("<u2") << 8).view("<f2")
    return e4m3(x) if dtype == "F8_E4M3" else x


def e4m3(x):
    fraction = np.float32(x % 8 + 8 * (x & 120 > 0))
    return np.ldexp(fraction, np.maximum(x >> 3 & 15, 1).astype("i4") - 10) * np.float32(1 - 2.0 * (x >> 7))


def rounded(x, dtype):
    if dtype != "BF16":
        return x.astype("<f8") if dtype == "F64" else x.astype("<f4").astype(TYPES[dtype])
    u = x.astype("<f4").view("<u4")
    return (u + 0x7FFF + (u >> 16 & 1) & 0xFFFF0000).astype("<u4").view("<f4")


def book(n):
    phi = NormalDist()
    v = [phi.inv_cdf((i + .5) / n) for i in range(n)]
    for _ in range(500):
        p = [0, *(phi.cdf((a + b) / 2) for a, b in pairwise(v)), 1]
        v = [phi.inv_cdf((a + b) / 2) for a, b in pairwise(p)]
    return np.float32([(a - b) / 2 for a, b in zip(v, v[::-1], strict=True)])


def matrix(codec, config, s, rows, columns):
    """Return the float32 matrix that affine, nf4, fp8 or bilora code row by row."""
    if codec == "fp8":
        return e4m3(s["codes"]).reshape(rows, columns) * s["scale"][:, None]
    if codec == "nf4":
        code = np.stack([s["codes"] >> 4, s["codes"] & 15], 1).reshape(-1)[: rows * columns]
        block = MAP[s["absmax"]] * np.repeat(s["scale"], 256)[: len(s["absmax"])] + s["offset"]
        return (LEVELS[code] * np.repeat(block, 64)[: len(code)]).reshape(rows, columns)
    width = config["width"]
    bits = np.unpackbits(s["codes"], bitorder="little")[: rows * columns * width]
    code = bits.reshape(rows, columns, width) @ (1 << np.arange(width))
    if codec == "bilora":
        return book(2**width)[code] * s["moments"][1] + s["moments"][0]
    group = np.arange(columns) // config["group"]
    step, low = (np.float32(s[x]).reshape(rows, -1)[:, group] for x in ("step", "low"))
    return low + step * np.float32(code)


def weight(codec, s, m, n):
    """Return the float64 factor or weight (m, n) that PEFT's coefficients stand for."""
    if codec == "tucker":
        mid, down = np.float64(s["mid"]), np.float64(s["down"])
        return np.einsum("pqk,qi->pik", mid.reshape(*mid.shape[:2], -1), down).reshape(m, n)
    if codec == "lines":
        made, rows, cols = np.zeros((m, n)), s.get("rows", np.arange(m)), s.get("cols", np.arange(n))
        made[np.ix_(rows, cols)] = s["values"].reshape(len(rows), len(cols))
        return made
    if codec == "circulant":
        turn = np.arange(s["kernel"].shape[2])
        return np.float64(s["kernel"])[..., turn - turn[:, None]].transpose(0, 2, 1, 3).reshape(m, n) / n
    if codec == "randlora":
        a, b, lam, gamma = (np.float64(s[x]) for x in ("a", "b", "lambda", "gamma"))
        made = b.reshape(len(b), -1) @ (lam[:, :, None] * a[:, None] * gamma).reshape(-1, a.shape[1])
        return made if made.shape == (m, n) else made.T
    spectrum = np.zeros(m * n)
    spectrum[s["indices"]] = s["values"]
    if codec == "fourier":
        return np.fft.ifft2(spectrum.reshape(m, n)).real
    (a, h), (v, d) = spectrum.reshape(2, m // 2, 2, n // 2).transpose(0, 2, 1, 3)
    rows = [np.stack([a + h + v + d, a + h - v - d], 2), np.stack([a - h + v - d, a - h - v + d], 2)]
    return np.stack(rows, 1).reshape(m, n) / 2


def golomb(config, s):
    """Return rising positions from their gaps, block by block."""
    bits, made, at = np.unpackbits(s["bits"], bitorder="little"), [np.zeros(0)], 0
    for block, (count, modulus, size) in enumerate(s["table"].reshape(-1, 3).tolist()):
        k = modulus.bit_length() - 1
        cut, rest = 2 ** (k + 1) - modulus, bits[at + count * k : at + 8 * size]
        ends, heads = np.flatnonzero(rest)[:count], bits[at : at + count * k].reshape(count, k) @ (1 << np.arange(k))
        tails = iter(rest[ends[-1] + 1 :].tolist() if count else [])
        r = [head if head < cut else 2 * head + next(tails) - cut for head in heads.tolist()]
        made.append(block * config["span"] - 1 + np.cumsum((np.diff(ends, prepend=-1) - 1) * modulus + r + 1))
        at += 8 * size
    return np.concatenate(made).astype("<i8")


def factor(value, held):
    """Return the array of a field of a form: tensor number `value` of `held`, or decoded codes."""
    if not isinstance(value, dict):
        return held[value]
    config, codec = value["config"], value["codec"]
    s = {name: held[j] for name, j in value["streams"].items()}
    if codec == "golomb":
        return golomb(config, s)
    m, n = value["shape"]
    if "transpose" not in config:
        made = weight(codec, s, m, n)
    else:
        made = matrix(codec, config, s, n, m).T if config["transpose"] else matrix(codec, config, s, m, n)
    return rounded(made, value["dtype"])
