"""PTX that turns packed 4-bit codes into half-precision values with byte permutes: about three instructions a value.

A `prmt` looks four nibbles up in an eight-byte table, so a 16-entry table of 16-bit values is four lookups (low and
high bytes of entries 0-7 and 8-15), a byte blend by the nibbles' top bits, and one more `prmt` to pair the bytes up.
A gather from memory needs one load a value, and an SM starts only 32 of those in a cycle.
"""

from __future__ import annotations

import torch

from adaptc.kernels.weight import INT4, NF4


def byte_tables(entries: list[int]) -> list[int]:
    """Split 16 half-precision bit patterns into eight words: {low, high} bytes of entries {0-3, 4-7, 8-11, 12-15}."""
    return [
        sum(((e >> shift) & 0xFF) << (8 * i) for i, e in enumerate(entries[4 * quarter : 4 * quarter + 4]))
        for shift in (0, 8)
        for quarter in range(4)
    ]


def _emit(table: tuple[float, ...], dtype: torch.dtype) -> str:
    """Return the asm: $0-$3 pairs of values, columns 2 j and 2 j + 1 of the word $4.

    The tables are immediates: as operands they would keep Triton from moving the lookup into the tensor core's layout.
    Each is added to z, a zero the assembler cannot see through (no lane has a bit 31 below it), or it would load every
    table anew for every lookup: 440 instructions an iteration instead of 363.
    """
    bits = torch.tensor(table).to(dtype).view(torch.int16).tolist()
    t = [f"0x{word:08x}" for word in byte_tables([b & 0xFFFF for b in bits])]
    lines = [
        "{ .reg .b32 v, s, a, b, m, l, h, t, u, z;",
        "mov.u32 z, %lanemask_lt; shr.u32 z, z, 31;",
        "and.b32 v, $4, 0x77777777;",
        "shr.b32 s, $4, 3;",
        "and.b32 s, s, 0x11111111;",
    ]
    for first in (0, 2):
        lines.append("add.u32 t, z, 0xff00; prmt.b32 m, t, 0, s;")  # 0xff where the nibble is 8 or more
        for i, byte in enumerate("lh"):
            lines += [
                f"add.u32 t, z, {t[4 * i]}; add.u32 u, z, {t[4 * i + 1]}; prmt.b32 a, t, u, v;",
                f"add.u32 t, z, {t[4 * i + 2]}; add.u32 u, z, {t[4 * i + 3]}; prmt.b32 b, t, u, v;",
                f"lop3.b32 {byte}, a, b, m, 0xd8;",  # (a & ~m) | (b & m)
            ]
        lines += [f"prmt.b32 ${first}, l, h, 0x4051;", f"prmt.b32 ${first + 1}, l, h, 0x6273;"]
        if first == 0:
            lines += ["shr.b32 v, v, 16;", "shr.b32 s, s, 16;"]
    return "\n".join([*lines, "}"])


NF4_FP16, NF4_BF16 = _emit(NF4, torch.float16), _emit(NF4, torch.bfloat16)
INT4_FP16, INT4_BF16 = _emit(INT4, torch.float16), _emit(INT4, torch.bfloat16)
CONSTRAINTS = "=&r,=&r,=&r,=&r,r"
