"""Many adapters in one memory: fixed-size pages, so that adapters of any rank and width come and go without copying.

A page is 512 int16 (1 KiB): 512 words of sign planes, or 512 half-precision values of one direction, or one 16 x 16
block of a float32 core. Every adapter of every layer takes its pages from one pool, as in S-LoRA (arXiv 2311.03285);
a kernel finds them through the slot's row of `table` and the list `pages`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.errors import UnsupportedError, UsageError
from adaptc.kernels.resident import WORD, Resident

PAGE = 512
PLANES, PLAIN = 0, 1
KIND, WORDS_Q, WORDS_P, AT_Q, AT_P, AT_CORE = range(6)  # columns of the table


class Pool:
    """Pages of one device. `put` and `drop` change it; kernels read it.

    storage (pages, 512) int16; table (slots, 8) int32; scales (slots,) float32; pages (slots, entries) int32.
    """

    def __init__(
        self,
        pages: int,
        slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
        entries: int = 256,
    ) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise UnsupportedError(f"pool has dtype {dtype}, plain factors are held in float16 or bfloat16")
        self.dtype = dtype
        self.storage = torch.zeros(pages, PAGE, dtype=torch.int16, device=device)
        self.table = torch.zeros(slots, 8, dtype=torch.int32, device=device)
        self.scales = torch.zeros(slots, dtype=torch.float32, device=device)
        self.pages = torch.zeros(slots, entries, dtype=torch.int32, device=device)
        self.kinds = {PLANES: 0, PLAIN: 0}  # residents of each kind: kernels leave out what is absent
        self.widest = 0  # words of planes on the p side of the widest resident ever put
        self._shapes: dict[int, tuple[int, int]] = {}
        self._kind: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}
        self._free = list(range(pages - 1, -1, -1))
        self._slots = list(range(slots - 1, -1, -1))

    def put(self, adapter: Resident, scale: float) -> int:
        """Copy an adapter into free pages and return its slot.

        Raises UsageError where pages or slots run out, UnsupportedError for more pages than a slot lists.
        """
        chunks = _chunks(adapter, self.dtype)
        flat = [page for chunk in chunks for page in chunk]
        if len(flat) > self.pages.shape[1]:
            raise UnsupportedError(f"adapter takes {len(flat)} pages, a slot lists {self.pages.shape[1]}")
        if len(flat) > len(self._free) or not self._slots:
            raise UsageError(
                f"adapter takes {len(flat)} pages and a slot, {len(self._free)} and {len(self._slots)} are free"
            )
        slot = self._slots.pop()
        held = [self._free.pop() for _ in flat]
        device = self.storage.device
        self.storage[torch.tensor(held, device=device)] = torch.stack(flat).to(device)
        self.pages[slot, : len(held)] = torch.tensor(held, dtype=torch.int32)
        kind = PLANES if adapter.packed else PLAIN
        words_q, words_p = (adapter.core.shape[0] // WORD, adapter.core.shape[1] // WORD)
        at_p, at_core = len(chunks[0]), len(chunks[0]) + len(chunks[1])
        self.table[slot] = torch.tensor([kind, words_q, words_p, 0, at_p, at_core, 0, 0], dtype=torch.int32)
        self.scales[slot] = scale
        self.kinds[kind] += 1
        self.widest = max(self.widest, words_p)
        self._kind[slot], self._held[slot], self._shapes[slot] = kind, held, adapter.shape
        return slot

    def drop(self, slot: int) -> None:
        """Give an adapter's pages and slot back."""
        if slot not in self._held:
            raise UsageError(f"slot {slot} holds no adapter")
        self._free += self._held.pop(slot)
        self.kinds[self._kind.pop(slot)] -= 1
        del self._shapes[slot]
        self._slots.append(slot)

    def shape(self, slot: int) -> tuple[int, int]:
        """(m, n) of the adapter in a slot."""
        if slot not in self._shapes:
            raise UsageError(f"slot {slot} holds no adapter")
        return self._shapes[slot]

    def get(self, slot: int) -> Resident:
        """Return a copy of the adapter in a slot; the inverse of `put`, for the specification and for tests."""
        m, n = self.shape(slot)
        kind, words_q, words_p, at_q, at_p, at_core = self.table[slot, :6].tolist()
        listed = self.pages[slot].long()
        rows = (words_q, words_p) if kind == PLANES else (WORD * words_q, WORD * words_p)
        sides = []
        for at, count, length in ((at_q, rows[0], n), (at_p, rows[1], m)):
            each = -(-length // PAGE)
            side = self.storage[listed[at : at + count * each]].view(count, each * PAGE)[:, :length]
            sides.append(side if kind == PLANES else side.contiguous().view(self.dtype))
        blocks = self.storage[listed[at_core : at_core + words_q * words_p]].view(torch.float32)
        core = blocks.view(words_q, words_p, WORD, WORD).transpose(1, 2).reshape(WORD * words_q, WORD * words_p)
        return Resident(sides[0].contiguous(), sides[1].contiguous(), core, WORD * max(words_q, words_p))

    @property
    def nbytes(self) -> int:
        """Bytes the pool takes, in use or not."""
        return sum(t.nbytes for t in (self.storage, self.table, self.scales, self.pages))

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Which rows of a batch run through which slot, built once for all layers of a forward pass.

    runs (R, 3) int32: slot (-1: base alone), first row, one past the last; no run is longer than `CHUNK` rows.
    first (tiles + 1,) int32: the first run that reaches into each tile of `TILE` rows, and R. each (M,) int32: the
    slot of every row.
    """

    runs: Tensor
    first: Tensor
    each: Tensor
    rows: int
    slots: tuple[int, ...]


CHUNK = 64
TILE = 64


def batch(slots: list[int], device: torch.device | str = "cpu") -> Batch:
    """Group the rows of a batch, given the slot of each row (-1: base alone), in runs of equal neighbours."""
    runs: list[list[int]] = []
    for row, slot in enumerate(slots):
        if runs and runs[-1][0] == slot and runs[-1][2] - runs[-1][1] < CHUNK and row % TILE:
            runs[-1][2] = row + 1
        else:
            runs.append([slot, row, row + 1])
    starts = [next((i for i, run in enumerate(runs) if run[2] > row), len(runs)) for row in range(0, len(slots), TILE)]
    table = torch.tensor(runs, dtype=torch.int32).view(-1, 3)
    first = torch.tensor([*starts, len(runs)], dtype=torch.int32)
    each = torch.tensor(slots, dtype=torch.int32)
    return Batch(table.to(device), first.to(device), each.to(device), len(slots), tuple(sorted(set(slots) - {-1})))


def _chunks(adapter: Resident, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Cut q, p and core into pages, in the order the kernels look them up."""
    sides = []
    for side in (adapter.q, adapter.p):
        rows = side if adapter.packed else side.to(dtype).view(torch.int16)
        each = -(-rows.shape[1] // PAGE)
        room = rows.new_zeros(rows.shape[0], each * PAGE)
        room[:, : rows.shape[1]] = rows
        sides.append(list(room.view(-1, PAGE)))
    words_q, words_p = adapter.core.shape[0] // WORD, adapter.core.shape[1] // WORD
    blocks = adapter.core.view(words_q, WORD, words_p, WORD).transpose(1, 2).reshape(-1, WORD * WORD)
    return sides[0], sides[1], list(blocks.contiguous().view(torch.int16))
