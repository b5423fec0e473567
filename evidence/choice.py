"""Multiple choice: which ending a language model finds likeliest after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.evidence.model import Loaded
from adaptc.evidence.rows import Row
from adaptc.evidence.tally import Asked, Said


@dataclass(frozen=True, eq=False)
class Choice:
    """One row in tokens: prompt and ending of every option, where each ending begins, and its length in bytes."""

    ids: tuple[Tensor, ...]
    starts: tuple[int, ...]
    nbytes: Tensor  # (options,)


def choice_batches(loaded: Loaded, rows: Sequence[Row], places: int | None) -> Iterator[tuple[Asked, Choice]]:
    """Yield every row, checked. An ending begins after the tokens that prompt + ending shares with the prompt alone.

    Raises FormatError for rows of fewer than two endings, labels out of range, texts longer than the model takes.
    """
    labelled = sum(row.label is not None for row in rows)
    for i, row in enumerate(rows, 1):
        if len(row.choices) < 2:
            raise FormatError(f"row {i} has {len(row.choices)} choices, at least 2 are wanted")
        if row.label is None and labelled:
            raise FormatError(f"row {i} has no label, {labelled} of {len(rows)} rows have one")
        if row.label is not None and not 0 <= row.label < len(row.choices):
            raise FormatError(f"row {i} has label {row.label} of {len(row.choices)} choices")
        prompt = loaded.tokenizer(row.text)["input_ids"]
        ids = [loaded.tokenizer(row.text + ending)["input_ids"] for ending in row.choices]
        starts = [next((j for j, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
                       min(len(prompt), len(whole))) for whole in ids]
        for ending, whole, start in zip(row.choices, ids, starts, strict=True):
            if start >= len(whole):
                raise FormatError(f"row {i} has the choice {ending[:20]!r}, which adds no token to the prompt")
            if start == 0:
                raise FormatError(f"row {i} has a prompt without a token before its choices")
            if places is not None and len(whole) > places:
                raise FormatError(f"row {i} has {len(whole)} tokens, the model has {places} positions")
        target = torch.tensor([row.label]) if row.label is not None else None
        nbytes = torch.tensor([max(len(ending.encode()), 1) for ending in row.choices], dtype=torch.float64)
        yield Asked(torch.tensor([i - 1]), target), Choice(tuple(map(torch.tensor, ids)), tuple(starts), nbytes)


def ask_choice(model: Any, choice: Choice) -> Said:
    """Return log p(ending | prompt) of every option, (1, options), and the top one of these by bytes of the ending."""
    longest = max(map(len, choice.ids))
    padded = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids in choice.ids])
    mask = torch.stack([(torch.arange(longest) < len(ids)).long() for ids in choice.ids])
    logits = model(input_ids=padded, attention_mask=mask).logits
    scores = []
    for ids, start, said in zip(choice.ids, choice.starts, logits, strict=True):
        logp = said[start - 1 : len(ids) - 1].double().log_softmax(-1)
        scores.append(logp.gather(-1, ids[start:, None]).sum())
    score = torch.stack(scores)
    return Said(score[None], (score / choice.nbytes).argmax()[None])
