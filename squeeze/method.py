"""What a merge method is: a function on the deltas of one parameter, and the facts about it that the docs print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from adaptc.registry import Registry
from adaptc.squeeze.joint import Joint, Part, joint


@dataclass(frozen=True)
class Options:
    """Options of methods; each method names the ones it reads."""

    density: float = 0.5
    seed: int = 0
    space: str = "core"
    gauge: str = "balanced"
    reweight: str = "both"


@dataclass(frozen=True)
class Task:
    """The deltas of one parameter, one part an input (rank 0 where the input lacks it), weights, and the rank wanted.

    `key` and the seed give every parameter its own random stream, so results do not depend on the order of work.
    """

    key: str
    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    rank: int
    options: Options = field(default_factory=Options)

    @cached_property
    def joint(self) -> Joint:
        """The joint core of the parts."""
        return joint(self.parts)

    @property
    def w(self) -> Tensor:
        """The weights as a float64 vector (T,)."""
        device = self.parts[0].b.device if self.parts else torch.device("cpu")
        return torch.tensor(self.weights, dtype=torch.float64, device=device)

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Return a fresh generator for this parameter, a function of the seed, the key and `stream` alone."""
        name = int.from_bytes(blake2b(self.key.encode(), digest_size=8).digest(), "little")
        return np.random.default_rng([self.options.seed, name, stream])


@dataclass(frozen=True, slots=True, eq=False)
class InCore:
    """A merged delta U m V^T in the bases of `joint`."""

    joint: Joint
    m: Tensor  # (p, q)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A merged delta b @ a, float64."""

    b: Tensor  # (m, k)
    a: Tensor  # (k, n)


Result: TypeAlias = InCore | Pair


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to merge. `entries` is the elementwise rule (T, ...) -> (...) of methods that have one.

    `space` is where it works, `exact` what it does to the weighted sum, `averages` whether only the ratio of weights
    counts, `positive` whether negative weights make no sense, `options` the fields of Options it reads, `lossless`
    whether the rank is by default left as large as needed; `tight` is what to say when --rank is no more than the
    inputs' own.
    """

    name: str
    run: Callable[[Task], Result]
    space: str
    exact: str
    paper: str
    avoid: str
    options: frozenset[str] = frozenset()
    averages: bool = False
    positive: bool = False
    lossless: bool = False
    tight: str = ""
    entries: Callable[[Tensor, Task], Tensor] | None = None


MERGES: Registry[Method] = Registry("adaptc.merges", "merge method")


def in_canonical_core(entries: Callable[[Tensor, Task], Tensor]) -> Callable[[Task], InCore]:
    """Return the method that applies an elementwise rule to M_t (T, p, q) in the canonical bases of the joint core."""
    def run(task: Task) -> InCore:
        frame = task.joint.canonical()
        return InCore(frame, entries(frame.cores, task))

    return run


def in_factors(rule: Callable[[Tensor, Tensor, Task, int], Tensor], task: Task) -> Pair:
    """Return the pair that `rule` makes of stacked A's and stacked B's, each on its own (PEFT's add_weighted_adapter).

    rule(x (T, ...), v (T,), task, side) with v_t = sqrt(|w_t s_t|), its sign on A only. Ranks are padded with zeros.
    """
    r = max(p.a.shape[0] for p in task.parts)
    a, b, v = [], [], []
    for p, w in zip(task.parts, task.weights, strict=True):
        left = p.b.double() if p.core is None else p.b.double() @ p.core.double()
        a.append(torch.nn.functional.pad(p.a.double(), (0, 0, 0, r - p.a.shape[0])))
        b.append(torch.nn.functional.pad(left, (0, r - left.shape[1])))
        v.append(w * p.scale)
    signed = torch.tensor(v, dtype=torch.float64, device=a[0].device)
    root = signed.abs().sqrt()
    made_b = rule(torch.stack(b), root, task, 1)
    return Pair(made_b, rule(torch.stack(a), torch.where(signed < 0, -root, root), task, 0))
