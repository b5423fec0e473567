"""Calibration statistics of a base model's inputs: read from a file, asked for by parameter name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError
from adaptc.tensorfile import TensorFile

SUFFIXES = ("xx", "x2", "g2")


class Calibration(Mapping[str, Tensor]):
    """Second moments of the inputs of linear layers, from one safetensors file.

    For a parameter P: `P.xx` is E[x x^T] (in, in), or `P.x2` its diagonal E[x^2] (in,), over calibration tokens;
    `P.g2`, if there, the mean squared gradient at the outputs, one number. The metadata entry `adaptc.calibration`
    (JSON) says how many tokens of what were seen.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NeedsError(f"{path} does not exist", hint="--calibration wants a safetensors file of statistics")
        self.path, self._file = path, TensorFile(path)
        odd = next((k for k in self._file if k.rpartition(".")[2] not in SUFFIXES), None)
        if odd is not None:
            raise FormatError(f"{path.name}: {odd} is no statistic (known: {', '.join('.' + s for s in SUFFIXES)})")
        try:
            self.about: dict[str, Any] = dict(json.loads(self._file.metadata.get("adaptc.calibration", "{}")))
        except (ValueError, TypeError) as e:
            raise FormatError(f"{path.name}: metadata adaptc.calibration is not a JSON object") from e

    def output_energy(self, key: str, b: Tensor, a: Tensor) -> float:
        """Return E||b a x||^2 in float64 for factors b (m, r), a (r, n) of parameter `key`.

        Raises NeedsError if there are no statistics of that parameter, FormatError if they are of another width or
        not those of any inputs.
        """
        moment = self.get(f"{key}.xx", self.get(f"{key}.x2"))
        if moment is None:
            raise NeedsError(f"{self.path.name} has no statistics of {key}")
        n = a.shape[-1]
        if tuple(moment.shape) not in ((n, n), (n,)):
            raise FormatError(f"{key}: statistics have shape {tuple(moment.shape)}, the layer has {n} inputs")
        a, moment = a.double(), moment.double()
        through = (a * moment) @ a.mT if moment.dim() == 1 else a @ moment @ a.mT
        energy = float(((b.double().mT @ b.double()) * through).sum())
        if not 0 <= energy < float("inf"):
            raise FormatError(f"{key}: statistics are no second moments, they give an output energy of {energy:.3g}")
        return energy

    def sensitivity(self, key: str) -> float:
        """Return the mean squared gradient at the outputs of `key`, 1 where none was recorded."""
        g2 = self.get(f"{key}.g2")
        return 1.0 if g2 is None else float(torch.mean(g2.double()))

    def __getitem__(self, key: str) -> Tensor:
        return self._file[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
