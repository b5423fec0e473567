"""A base model and adapters made ready for a task: as many classes as the heads say, and a head for everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adaptc.adapter import Adapter, Origin
from adaptc.errors import FormatError, NeedsError
from adaptc.evidence.evaluate import Kind
from adaptc.evidence.model import Loaded, head_of, labels_of, load_model

BASE = Adapter({}, {}, Origin("none"))  # the base model alone, as an adapter


def ready(base: str | Path, task: Kind, adapters: Mapping[str, Adapter], donor: Adapter | None = None
          ) -> tuple[Loaded, dict[str, Adapter]]:
    """Load `base` for `task` with the classes that the adapters' heads have, and give every adapter a head.

    `donor` is an adapter whose classifier takes the place of everyone's. Raises FormatError for heads that disagree,
    NeedsError where a classifier would be left random, and what load_model raises.
    """
    labels = classes_of({**adapters, "--head-from": donor} if donor is not None else adapters)
    loaded = load_model(base, "classify" if task == "classify" else "lm", labels if task == "classify" else None)
    return loaded, fitted(loaded, task, adapters, donor)


def fitted(loaded: Loaded, task: Kind, adapters: Mapping[str, Adapter], donor: Adapter | None) -> dict[str, Adapter]:
    """Return the adapters as the loaded model takes them for a task: for `classify` each with a head."""
    if task != "classify":
        return dict(adapters)
    return {name: with_head(name, a, loaded.missing, donor) for name, a in adapters.items()}


def with_head(name: str, adapter: Adapter, missing: Sequence[str], donor: Adapter | None) -> Adapter:
    """Return `adapter` with the classifier of `donor` in place of its own, if there is a donor.

    `missing` are parameters that the base has no values for. Raises NeedsError where nobody gives them values.
    """
    if donor is not None:
        head = head_of(donor)
        stem = None if head is None else head.removesuffix("weight")
        given = {k: t for k, t in donor.replaced.items()
                 if k in missing or (stem is not None and k.startswith(stem))}
        adapter = replace(adapter, replaced={**adapter.replaced, **given})
    lost = [key for key in missing if key not in adapter.replaced]
    if lost:
        raise NeedsError(f"{name}: neither the base nor the adapter holds {lost[0]}, the classifier would be random",
                         hint="--head-from ADAPTER takes the classifier of another adapter")
    return adapter


def classes_of(adapters: Mapping[str, Adapter]) -> int | None:
    """Return the number of classes of the heads that adapters carry, None without any. Raises FormatError on two."""
    found = {name: n for name, a in adapters.items() if (n := labels_of(a)) is not None}
    for name, n in found.items():
        first, classes = next(iter(found.items()))
        if n != classes:
            raise FormatError(f"{name} has a classifier of {n} classes, {first} one of {classes}")
    return next(iter(found.values()), None)
