"""The PTX of the 4-bit lookup, executed here instruction by instruction: no GPU is needed to know it is right."""

from __future__ import annotations

import re

import pytest
import torch

from adaptc.kernels.lookup import INT4_BF16, INT4_FP16, NF4_BF16, NF4_FP16
from adaptc.kernels.weight import INT4, NF4


def execute(ptx: str, word: int) -> list[int]:
    """Run the few PTX instructions of the lookup; return $0 .. $3."""
    regs: dict[str, int] = {"$4": word, "%lanemask_lt": 0x7FFFFFFF}

    def value(token: str) -> int:
        return regs[token] if token in regs else int(token, 0)

    for line in re.split(r"[;\n]", ptx):
        parts = line.replace("{", "").replace("}", "").split(None, 1)
        if not parts or parts[0].startswith(".reg"):
            continue
        target, *operands = (token.strip() for token in parts[1].split(","))
        v = [value(token) for token in operands]
        op = parts[0].split(".")[0]
        if op == "mov":
            out = v[0]
        elif op == "and":
            out = v[0] & v[1]
        elif op == "shr":
            out = v[0] >> v[1]
        elif op == "add":
            out = (v[0] + v[1]) & 0xFFFFFFFF
        elif op == "prmt":
            pool = v[0] | v[1] << 32
            picks = [(v[2] >> 4 * i) & 15 for i in range(4)]
            assert all(pick < 8 for pick in picks), "a set top bit would replicate signs"
            out = sum(((pool >> 8 * pick) & 0xFF) << 8 * i for i, pick in enumerate(picks))
        elif op == "lop3":
            out = sum(
                ((v[3] >> (4 * (v[0] >> i & 1) + 2 * (v[1] >> i & 1) + (v[2] >> i & 1))) & 1) << i for i in range(32)
            )
        else:
            raise AssertionError(line)
        regs[target] = out
    return [regs[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    ("ptx", "table", "dtype"),
    [
        (NF4_FP16, NF4, torch.float16),
        (NF4_BF16, NF4, torch.bfloat16),
        (INT4_FP16, INT4, torch.float16),
        (INT4_BF16, INT4, torch.bfloat16),
    ],
)
def test_every_code_in_every_place(ptx: str, table: tuple[float, ...], dtype: torch.dtype) -> None:
    values = torch.tensor(table).to(dtype)
    words = [sum(((code + 5 * place) % 16) << 4 * place for place in range(8)) for code in range(16)]
    words += [0, 0xFFFFFFFF, 0x80000001, 0x76543210]
    for word in words:
        pairs = torch.tensor(execute(ptx, word), dtype=torch.int64)
        halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=1).reshape(-1)
        got = torch.where(halves >= 1 << 15, halves - (1 << 16), halves).to(torch.int16).view(dtype)
        order = [place ^ 1 for place in range(8)]  # the even column is a byte's high nibble
        want = values[[(word >> 4 * place) & 15 for place in order]]
        assert torch.equal(got, want), hex(word)
