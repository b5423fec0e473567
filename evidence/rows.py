"""Data files: plain text, JSON lines, TSV; read whole, checked, one error a line that is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError


@dataclass(frozen=True)
class Row:
    """One example: its text, its class or None, and for multiple choice the endings with the right one in `label`."""

    text: str
    label: int | None = None
    choices: tuple[str, ...] = ()


def read_rows(path: str | Path) -> list[Row]:
    """Read examples: .txt is one row of the whole text, .tsv is `text TAB label` a line, .jsonl an object a line.

    JSON keys: "text" (or "prompt"), optional "label" (or "answer"), optional "choices". Raises NeedsError for a file
    that is not there, FormatError naming the line for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise NeedsError(f"{path} does not exist", hint="--data wants a .txt, .tsv or .jsonl file")
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError as e:
        raise FormatError(f"{path.name}: byte {e.start} is not UTF-8 text") from e
    if path.suffix == ".txt":
        rows = [Row(text)] if text.strip() else []
    elif path.suffix in (".jsonl", ".json"):
        rows = [_object(path.name, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix == ".tsv":
        rows = [_columns(path.name, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        raise FormatError(f"{path.name}: data ends in {path.suffix or 'nothing'} (known: .txt, .tsv, .jsonl)")
    if not rows:
        raise FormatError(f"{path.name} holds no rows")
    return rows


def windows(rows: list[Row], tokenizer: Any, length: int) -> list[Tensor]:
    """Return token ids (<= length,) of all texts in order, each text cut into windows; the last may be shorter."""
    out: list[Tensor] = []
    for row in rows:
        ids = torch.tensor(tokenizer(row.text)["input_ids"], dtype=torch.long)
        out += [w for w in torch.split(ids, length) if w.numel() > 1]
    return out


def _object(name: str, line: int, text: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise FormatError(f"{name}: line {line} is not JSON") from e
    if not isinstance(value, dict):
        raise FormatError(f"{name}: line {line} is not a JSON object")
    said = value.get("text", value.get("prompt"))
    if not isinstance(said, str):
        raise FormatError(f"{name}: line {line} has no \"text\" (keys: {', '.join(map(str, value)) or 'none'})")
    label, choices = value.get("label", value.get("answer")), value.get("choices", [])
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise FormatError(f"{name}: line {line} has label {label!r}, a class number is wanted")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise FormatError(f"{name}: line {line} has choices that are no list of texts")
    return Row(said, label, tuple(choices))


def _columns(name: str, line: int, text: str) -> Row:
    said, tab, label = text.rpartition("\t")
    if not tab:
        return Row(text)
    try:
        return Row(said, int(label))
    except ValueError as e:
        raise FormatError(f"{name}: line {line} ends in {label[:40]!r}, a class number is wanted") from e
