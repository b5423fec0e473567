"""From logits to sums: what one adapter said about a batch, beside what the reference said, kept unit by unit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptc.evidence.metrics import Observed, equal_mass, equal_width

_STEP = 64  # predictions taken to float64 at once: a vocabulary of 150,000 then needs 77 MB a distribution
_CLASSES = 100  # up to here the adaptive calibration error looks at every class, beyond it at the top one


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be predicted: the unit of each of p predictions, and the right answers where they are known."""

    unit: Tensor  # (p,) int64
    target: Tensor | None  # (p,) int64


@dataclass(frozen=True, eq=False)
class Said:
    """What a model answered: logits (p, classes), and by another normalisation which one is on top, where asked for."""

    logits: Tensor
    normed: Tensor | None = None  # (p,) int64


@dataclass(eq=False)
class Tally:
    """The running sums of one adapter over the `units` units of a task."""

    units: int
    task: str
    sums: dict[str, Tensor] = field(default_factory=dict)
    confidence: list[Tensor] = field(default_factory=list)
    classes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    unit: list[Tensor] = field(default_factory=list)

    def add(self, asked: Asked, said: Said, reference: Said | None) -> None:
        """Take in one batch. KL(p || q) = sum p (log p - log q) with p the reference; sums in float64.

        The loss of a window is the float32 cross entropy that models report themselves: over a large vocabulary it is
        about 1e-5 off the float64 one, and perplexities are compared with those that others print.
        """
        if self.task == "lm" and asked.target is not None:
            loss = torch.nn.functional.cross_entropy(said.logits.float(), asked.target)
            self._sum("loss", asked.unit[:1], loss.double()[None])
        for at in range(0, len(asked.unit), _STEP):
            rows = slice(at, at + _STEP)
            unit, logp = asked.unit[rows], said.logits[rows].double().log_softmax(-1)
            top = logp.argmax(-1)
            self._sum("count", unit, torch.ones(len(unit), dtype=torch.float64))
            if asked.target is not None:
                self._known(unit, logp, top, asked.target[rows])
                if said.normed is not None:
                    self._sum("right_normed", unit, (said.normed[rows] == asked.target[rows]).double())
            if reference is not None:
                logr = reference.logits[rows].double().log_softmax(-1)
                self._sum("kl", unit, (logr.exp() * (logr - logp)).sum(-1).clamp(min=0.0))
                self._sum("agree", unit, (logr.argmax(-1) == top).double())

    def _known(self, unit: Tensor, logp: Tensor, top: Tensor, target: Tensor) -> None:
        right = top == target
        self._sum("nll", unit, -logp.gather(-1, target[:, None])[:, 0])
        self._sum("right", unit, right.double())
        self.unit.append(unit)
        self.right.append(right)
        self.confidence.append(logp.amax(-1).exp())
        if self.task == "classify" and logp.shape[-1] <= _CLASSES:
            self.classes.append((logp.exp(), target[:, None] == torch.arange(logp.shape[-1])))

    def _sum(self, name: str, unit: Tensor, values: Tensor) -> None:
        into = self.sums.setdefault(name, torch.zeros(self.units, dtype=torch.float64))
        into.index_add_(0, unit, values)

    def observed(self) -> Observed:
        """Return the sums and the bins of calibration errors."""
        sums, bins = dict(self.sums), {}
        if self.right:
            unit, right, confidence = torch.cat(self.unit), torch.cat(self.right), torch.cat(self.confidence)
            bins["confidence"] = equal_width(confidence, right, unit, self.units)
            if self.classes:
                each, true = (torch.cat(parts) for parts in zip(*self.classes, strict=True))
            else:
                each, true = confidence[:, None], right[:, None]
            bins["adaptive"] = equal_mass(each, true, unit, self.units)
        return Observed(sums, bins)
