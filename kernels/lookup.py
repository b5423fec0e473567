"""PTX that turns packed 4-bit codes into half-precision values with byte permutes: about three instructions a value.

A `prmt` looks four nibbles up in an eight-byte table, so a 16-entry table of 16-bit values is four lookups (low and high
bytes of entries 0-7 and 8-15), a byte blend by the nibbles' top bits, and one more `prmt` to pair the bytes up.
A gather from memory needs one load a value, and an SM starts only 32 of those in a cycle.
"""

from __future__ import annotations

import struct

from adaptc.kernels.weight import INT4, NF4


def _bf16(value: float) -> int:
    """Return the bits of a value rounded to nearest even in bfloat16."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def _fp16(value: float) -> int:
    """Return the bits of a value in float16."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return int(bits)


def byte_tables(entries: list[int]) -> dict[str, int]:
    """Split 16 half-precision values into eight 32-bit words: {low, high} byte x entries {0-3, 4-7, 8-11, 12-15}."""
    words = {}
    for shift, name in ((0, "l"), (8, "h")):
        for quarter in range(4):
            group = entries[4 * quarter : 4 * quarter + 4]
            words[f"{name}{quarter}"] = sum(((e >> shift) & 0xFF) << (8 * i) for i, e in enumerate(group))
    return words


def _emit(entries: list[int]) -> str:
    """Return the asm: $0, $1 the four high-nibble values, $2, $3 the four low-nibble values, $4 four code bytes."""
    t = {name: f"0x{word:08x}" for name, word in byte_tables(entries).items()}
    lines = [
        "{ .reg .b32 v, s, a, b, m, l, h;",
        "and.b32 v, $4, 0x77777777;",
        "shr.b32 s, $4, 3;",
        "and.b32 s, s, 0x11111111;",
    ]
    for high, low in (("$0", "$2"), ("$1", "$3")):
        lines.append("prmt.b32 m, 0xff00, 0, s;")  # 0xff where the nibble is 8 or more
        for byte in "lh":
            lines += [
                f"mov.b32 a, {t[byte + '0']}; mov.b32 b, {t[byte + '1']};",
                "prmt.b32 a, a, b, v;",
                f"mov.b32 b, {t[byte + '2']};",
                f"{{ .reg .b32 c; mov.b32 c, {t[byte + '3']}; prmt.b32 b, b, c, v; }}",
                f"lop3.b32 {byte}, a, b, m, 0xd8;",  # (a & ~m) | (b & m)
            ]
        lines += [f"prmt.b32 {high}, l, h, 0x7351;", f"prmt.b32 {low}, l, h, 0x6240;"]
        if high == "$0":
            lines += ["shr.b32 v, v, 16;", "shr.b32 s, s, 16;"]
    return "\n".join([*lines, "}"])


NF4_FP16 = _emit([_fp16(v) for v in NF4])
NF4_BF16 = _emit([_bf16(v) for v in NF4])
INT4_FP16 = _emit([_fp16(v) for v in INT4])
INT4_BF16 = _emit([_bf16(v) for v in INT4])
