"""The unfinished sums of a calibration on disk, so that a killed run goes on where it was and ends the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.calibration import Gradient
from adaptc.errors import FormatError, UsageError
from adaptc.evidence.calibrate_run import Run
from adaptc.formats.atomic import staged
from adaptc.tensorfile import TensorFile, write_tensors

_KEY = "adaptc.calibrate"


class State:
    """Moments of the side that is finished, and the running sums of `run`, kept in OUT.partial.

    `digest` is of everything the result depends on; sums are stored as they are in memory, float64, so the bytes of
    the result do not depend on where a run was cut. `cost` is the seconds that the last save took.
    """

    def __init__(self, out: Path, digest: str, run: Run) -> None:
        self.path, self.digest, self.run = out.with_name(out.name + ".partial"), digest, run
        self.train: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # of the train side, once it is finished
        self.cost = 0.0

    def turn(self) -> None:
        """Finish the side that is being summed: its means are kept as float32, the sums begin again."""
        moments = self.run.moments
        means = {k: moments.mean(k).float().cpu() for k in moments.sums}
        if self.train:
            self.held = means
        else:
            self.train, self.counts = means, dict(moments.counts)
            moments.clear()

    def load(self, force: bool, resume: bool) -> int:
        """Take up what an earlier run left; return how many batches it had done.

        A state of another request is dropped with `force`. Raises UsageError for one without it, and where there is
        none although the user said to `resume`; FormatError for a damaged one.
        """
        if not self.path.is_file():
            if resume:
                raise UsageError(f"{self.path} does not exist, there is nothing to resume")
            return 0
        file = TensorFile(self.path)
        said = _said(file, self.path)
        if said["digest"] != self.digest:
            if force and not resume:
                return 0
            raise UsageError(f"{self.path} was left by a run with another request, model or text",
                             hint="the same request goes on from it; --force begins anew")
        moments, importance = self.run.moments, self.run.importance
        self.train = _under(file, "train/")
        self.counts, moments.counts, moments.leaders = said["train_counts"], said["counts"], said["leaders"]
        device = {k: next(m.parameters()).device for k, m in moments.layers.items()}
        moments.sums = {k: t.to(device[k]) for k, t in _under(file, "sum/").items()}
        if importance is not None:
            importance.steps, importance.skipped = said["steps"]
            parts = {s: _under(file, f"{s}/") for s in ("rows", "cols", "rows2", "cols2")}
            importance.sums = {k: Gradient(**{s: parts[s][k] for s in parts}) for k in importance.sums}
        return int(said["done"])

    def save(self, done: int) -> None:
        """Put the state after `done` batches in place of the one before, whole or not at all."""
        began = time.monotonic()
        moments, importance = self.run.moments, self.run.importance
        tensors = {f"train/{k}": t for k, t in self.train.items()} | {f"sum/{k}": t for k, t in moments.sums.items()}
        for key, gradient in self.run.gradients.items():
            tensors |= {f"{s}/{key}": t for s, t in vars(gradient).items()}
        said: dict[str, Any] = {
            "digest": self.digest, "done": done, "counts": moments.counts, "train_counts": self.counts,
            "leaders": moments.leaders, "steps": [importance.steps, importance.skipped] if importance else [0, 0],
        }
        with staged(self.path, force=True) as temp, temp.open("wb") as f:
            write_tensors(f, tensors, {_KEY: json.dumps(said)})
        self.cost = time.monotonic() - began

    def remove(self) -> None:
        """Remove the file: the result is written."""
        self.path.unlink(missing_ok=True)


def _said(file: TensorFile, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.metadata[_KEY])
        return {k: said[k] for k in ("digest", "done", "counts", "train_counts", "leaders", "steps")}
    except (KeyError, ValueError, TypeError) as e:
        raise FormatError(f"{path.name}: no state of a calibration") from e


def _under(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): file[k].clone() for k in file if k.startswith(prefix)}
