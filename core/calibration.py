"""Calibration statistics of a base model's layers: read from a file, asked for by parameter name, and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError
from adaptc.tensorfile import TensorFile, write_tensors

Split = Literal["train", "held"]
SPLITS: tuple[Split, ...] = ("train", "held")
SUFFIXES = ("xx", "x2", "g2", "rows", "cols", "rows2", "cols2")
_HELD = "held/"
_BLOCK = 1 << 22  # entries of a row block of dW that meets a full moment


@dataclass(frozen=True, eq=False)
class Gradient:
    """Sums of the importance of one weight M (m, n), averaged over batches (LoRAPrune, Zhang et al. 2023).

    With G the gradient at M estimated from those at the adapter's factors: rows (m,) and cols (n,) are sums of
    |G o M| over a row and over a column, rows2 and cols2 those of (G o M)^2.
    """

    rows: Tensor
    cols: Tensor
    rows2: Tensor
    cols2: Tensor


class Calibration(Mapping[str, Tensor]):
    """What the linear layers of a base model saw on calibration text, from one safetensors file.

    For a parameter P of logical shape (m, n): `P.xx` is E[x x^T] (n, n) over all tokens, or `P.x2` its diagonal (n,);
    `P.g2` the mean squared gradient at the outputs, one number; `P.rows`, `P.cols`, `P.rows2`, `P.cols2` see Gradient.
    `held/P.xx` is the same over the tokens kept aside. The metadata entry `adaptc.calibration` (JSON, here `about`)
    says "tokens", "held_tokens", and in "shared" {P: Q} which layers have their moments under another's name.

    As a mapping it holds the tensors by their names in the file; `moment` and the others take a parameter name, as
    given or with a leading component more or less, as Base does.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NeedsError(f"{path} does not exist", hint="adaptc calibrate writes a file of statistics")
        self.path, self._file = path, TensorFile(path)
        odd = next((k for k in self._file if k.rpartition(".")[2] not in SUFFIXES), None)
        if odd is not None:
            raise FormatError(f"{path.name}: {odd} is no statistic (known: {', '.join('.' + s for s in SUFFIXES)})")
        self.about = _about(self._file.metadata.get("adaptc.calibration", "{}"), path.name)
        self._shared: dict[str, str] = self.about.get("shared", {})
        self.parameters = tuple(dict.fromkeys([*(k.removeprefix(_HELD).rpartition(".")[0] for k in self._file),
                                               *self._shared]))
        self._by_tail: dict[str, list[str]] = {}
        for name in self.parameters:
            self._by_tail.setdefault(name.split(".", 1)[-1], []).append(name)

    def name_of(self, key: str) -> str | None:
        """Return the file's name for parameter `key`, None if it has none or several."""
        if key in self._shared or any(f"{p}{key}.{s}" in self._file for p in ("", _HELD) for s in SUFFIXES):
            return key
        near = [key.split(".", 1)[-1]] if "." in key else []
        hits = [n for n in near if n in self.parameters] + self._by_tail.get(key, [])
        return hits[0] if len(set(hits)) == 1 else None

    def moment(self, key: str, split: Split = "train") -> Tensor | None:
        """Return E[x x^T] (n, n) of the inputs of parameter `key`, or its diagonal (n,), as stored; None if unknown."""
        name = self.name_of(key)
        if name is None:
            return None
        stem = (_HELD if split == "held" else "") + self._shared.get(name, name)
        return self.get(f"{stem}.xx", self.get(f"{stem}.x2"))

    def gram(self, key: str, n: int, split: Split = "train") -> Tensor:
        """Return the second moment of `n` inputs in float64: (n, n), or (n,) where only its diagonal was collected.

        Raises NeedsError if there are no statistics of that parameter or they are of no tokens, FormatError if they
        are of another width or are no second moments.
        """
        moment = self.moment(key, split)
        if moment is None:
            raise NeedsError(f"{self.path.name} has no {'held-out ' if split == 'held' else ''}statistics of {key}",
                             hint="adaptc calibrate collects them for every linear layer")
        if tuple(moment.shape) not in ((n, n), (n,)):
            raise FormatError(f"{key}: statistics have shape {tuple(moment.shape)}, the layer has {n} inputs")
        seen = self.tokens(split, key)
        if seen is not None and seen < 1:
            raise NeedsError(f"{key}: {self.path.name} has seen {seen} tokens", hint="calibrate on more text")
        moment = moment.double()
        energy = moment if moment.dim() == 1 else moment.diagonal()
        if not (bool(torch.isfinite(moment).all()) and bool((energy >= 0).all())):
            least = float(energy.min())
            raise FormatError(f"{key}: statistics are no second moments, the smallest E[x^2] is {least:g}")
        return moment

    def gradient(self, key: str, shape: tuple[int, int] | None = None) -> Gradient | None:
        """Return the importance sums of parameter `key` in float64, None where none were collected.

        Raises FormatError if some of the four are missing, not finite, or not those of a weight of `shape`.
        """
        name = self.name_of(key)
        found = {s: self.get(f"{name}.{s}") for s in ("rows", "cols", "rows2", "cols2")}
        if name is None or all(t is None for t in found.values()):
            return None
        lost = [s for s, t in found.items() if t is None or t.dim() != 1 or not bool(torch.isfinite(t).all())]
        if lost:
            raise FormatError(f"{key}: gradient statistics lack {', '.join(lost)}, or they are no finite vectors")
        made = Gradient(**{s: t.double() for s, t in found.items() if t is not None})
        sizes = (len(made.rows), len(made.cols))
        if sizes != (len(made.rows2), len(made.cols2)) or (shape is not None and sizes != shape):
            raise FormatError(f"{key}: gradient statistics are of shape {sizes}, the layer has {shape}")
        return made

    def tokens(self, split: Split = "train", key: str | None = None) -> int | None:
        """Return how many tokens were seen, by all layers or by parameter `key`; None where the file does not say."""
        place = "tokens" if split == "train" else "held_tokens"
        own = self.about.get("counts", {}).get(self.name_of(key), {}) if key is not None else {}
        count = own.get(place, self.about.get(place))
        return count if isinstance(count, int) else None

    def short(self, key: str, n: int, split: Split = "train") -> str | None:
        """Return a note where full moments of `n` inputs come from fewer tokens than that, None where they do not."""
        seen, moment = self.tokens(split, key), self.moment(key, split)
        if seen is None or moment is None or moment.dim() == 1 or seen >= n:
            return None
        return f"{seen} calibration tokens for {n} inputs: what they do not span counts as free of error"

    def output_energy(self, key: str, b: Tensor, a: Tensor, split: Split = "train") -> float:
        """Return E||b a x||^2 = tr(b a C a^T b^T) in float64 for factors b (m, r), a (r, n) of parameter `key`.

        Raises what `gram` raises.
        """
        moment, a = self.gram(key, a.shape[-1], split), a.double()
        through = (a * moment) @ a.mT if moment.dim() == 1 else a @ moment @ a.mT
        gram = b.double().mT @ b.double()
        return _energy(key, float((gram * through).sum()), float((gram * (a @ a.mT)).sum()), moment)

    def energy(self, key: str, dw: Tensor, split: Split = "train") -> float:
        """Return E||dw x||^2 = tr(dw C dw^T) in float64 for dense dw (m, n), in row blocks. Raises as `gram` does."""
        moment, energy, size = self.gram(key, dw.shape[-1], split), 0.0, 0.0
        for rows in torch.split(dw, max(1, _BLOCK // dw.shape[-1])):
            rows = rows.double()
            energy += float(((rows * moment if moment.dim() == 1 else rows @ moment) * rows).sum())
            size += float(rows.square().sum())
        return _energy(key, energy, size, moment)

    def sensitivity(self, key: str) -> float:
        """Return the mean squared gradient at the outputs of `key`, 1 where none was recorded."""
        g2 = self.get(f"{self.name_of(key)}.g2")
        return 1.0 if g2 is None else float(torch.mean(g2.double()))

    def __getitem__(self, key: str) -> Tensor:
        return self._file[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def write_calibration(path: Path, moments: Mapping[str, Tensor], about: Mapping[str, Any], *,
                      held: Mapping[str, Tensor] | None = None, gradients: Mapping[str, Gradient] | None = None,
                      force: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Write statistics by parameter name, whole or not at all; a moment of two dimensions is full, of one diagonal.

    Moments and sums are stored as float32, rounded once from what they are given in. `about` becomes the metadata
    ("tokens", "held_tokens", "shared", ...). Raises UsageError if `path` exists, unless `force`.
    """
    from adaptc.formats.atomic import staged

    tensors = {f"{p}{k}.{'xx' if m.dim() == 2 else 'x2'}": m
               for p, some in (("", moments), (_HELD, held or {})) for k, m in some.items()}
    for k, g in (gradients or {}).items():
        tensors |= {f"{k}.{s}": t for s, t in vars(g).items()}
    with staged(path, force=force, inputs=inputs) as temp, temp.open("wb") as f:
        write_tensors(f, {k: t.float() for k, t in tensors.items()},
                      {"adaptc.calibration": json.dumps(dict(about), sort_keys=True)})


def _energy(key: str, energy: float, size: float, moment: Tensor) -> float:
    """Return an output energy, 0 for one that is below zero by no more than a moment's rounding to float32."""
    loudest = float(moment.max()) if moment.numel() else 0.0
    if not -1e-5 * size * loudest <= energy < float("inf"):
        raise FormatError(f"{key}: statistics are no second moments, they give an output energy of {energy:.3g}")
    return max(energy, 0.0)


def _about(text: str, file: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{file}: metadata adaptc.calibration is not a JSON object") from e
    if not isinstance(about, dict):
        raise FormatError(f"{file}: metadata adaptc.calibration is not a JSON object")
    shared, counts = about.get("shared", {}), about.get("counts", {})
    if not isinstance(shared, dict) or not all(isinstance(v, str) for v in shared.values()):
        raise FormatError(f"{file}: metadata adaptc.calibration has \"shared\" that is no map of names")
    if not isinstance(counts, dict) or not all(isinstance(v, dict) for v in counts.values()):
        raise FormatError(f"{file}: metadata adaptc.calibration has \"counts\" that is no map of counts")
    return about
