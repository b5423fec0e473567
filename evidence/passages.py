"""Calibration data as token sequences: windows of text or whole rows, some of them kept aside, in padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.evidence.model import Task
from adaptc.evidence.rows import Row, windows


@dataclass(frozen=True, eq=False)
class Passage:
    """Token ids (n,) int64 that the model reads at once, and their class where the data has one."""

    ids: Tensor
    label: int | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the ids: the same passage is on the same side wherever it stands."""
        return hashlib.sha256(self.ids.numpy().tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Batch:
    """Passages of unequal length side by side: ids and mask (k, longest), mask False where there is only padding."""

    ids: Tensor
    mask: Tensor
    labels: tuple[int | None, ...]


def read_passages(rows: Sequence[Row], tokenizer: Any, task: Task, window: int, max_tokens: int | None
                  ) -> list[Passage]:
    """Return the passages of data in order: for `lm` windows of `window` tokens, else rows cut at that length.

    A row of several lines without a label (a plain text) is read line by line where the task takes rows. With
    `max_tokens` only as many whole passages as stay within it. Raises FormatError where nothing is left.
    """
    if task == "lm":
        made = [Passage(ids) for ids in windows(list(rows), tokenizer, window)]
    else:
        lines = [Row(line, row.label) for row in rows
                 for line in ([row.text] if row.label is not None else row.text.splitlines()) if line.strip()]
        ids = (tokenizer(r.text, truncation=True, max_length=window)["input_ids"] for r in lines)
        made = [Passage(torch.tensor(i, dtype=torch.long), r.label) for i, r in zip(ids, lines, strict=True) if i]
    if not made:
        raise FormatError("the data holds no two tokens in a row" if task == "lm" else "the data holds no tokens")
    if max_tokens is None:
        return made
    kept, total = [], 0
    for passage in made:
        total += len(passage.ids)
        if total > max_tokens:
            break
        kept.append(passage)
    if not kept:
        raise UsageError(f"max-tokens is {max_tokens}, the first passage has {len(made[0].ids)} tokens",
                         hint="--window cuts passages shorter")
    return kept


def split_passages(passages: Sequence[Passage], share: float) -> tuple[list[Passage], list[Passage]]:
    """Return (train, held) in their order: held are the passages with the smallest digests, `share` of them.

    Equal passages are on one side. With `share` above 0 at least one is held, and always at least one is not. Raises
    FormatError for a share above 0 where all passages are equal.
    """
    digests = sorted({p.digest for p in passages})
    count = min(max(1, round(share * len(digests))), len(digests) - 1) if share else 0
    if share and not count:
        raise FormatError(f"{len(passages)} passages of data, all equal, cannot be split in two",
                          hint="--held-out 0 keeps nothing aside")
    aside = frozenset(digests[:count])
    return [p for p in passages if p.digest not in aside], [p for p in passages if p.digest in aside]


def batches(passages: Sequence[Passage], size: int, pad: int) -> list[Batch]:
    """Return batches of `size` passages in order, padded on the right with token `pad`."""
    made = []
    for at in range(0, len(passages), size):
        some = passages[at : at + size]
        longest = max(len(p.ids) for p in some)
        ids, mask = torch.full((len(some), longest), pad), torch.zeros(len(some), longest, dtype=torch.bool)
        for i, p in enumerate(some):
            ids[i, : len(p.ids)], mask[i, : len(p.ids)] = p.ids, True
        made.append(Batch(ids, mask, tuple(p.label for p in some)))
    return made
