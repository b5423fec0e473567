"""Which deltas of several adapters belong together, and everything that stops them from being joined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptc.adapter import Adapter, Replacement, Rows
from adaptc.delta import Delta
from adaptc.errors import FormatError, UnsupportedError, UsageError

# Fused parameter -> the parts other checkpoints split it into, as last component of the module path.
_FUSED = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "W_pack", "to_qkv", "in_proj", "attn_qkv"),
                    ("q_proj", "k_proj", "v_proj", "query", "key", "value", "to_q", "to_k", "to_v", "q", "k", "v")),
    **dict.fromkeys(("gate_up_proj", "w13"), ("gate_proj", "up_proj", "w1", "w3")),
}
# What quantised copies of a model add to its name.
_COPIES = re.compile(r"([-_.](\d+bits?|bf16|fp16|bnb|gptq|awq|gguf|mlx|int[48]|q[2-8](_\w+)?|unsloth|hf|dynamic))+$",
                     re.IGNORECASE)


@dataclass(frozen=True)
class Aligned:
    """Deltas side by side: key -> one entry an adapter, None where it lacks the parameter."""

    deltas: Mapping[str, tuple[Delta | None, ...]]
    notes: tuple[str, ...] = ()

    def missing(self, key: str, names: Sequence[str]) -> str:
        """Return "missing from b, c" for a key that not every adapter has, else ""."""
        lacks = [n for n, d in zip(names, self.deltas[key], strict=True) if d is None]
        return f"missing from {', '.join(lacks)}, counted as zero" if lacks else ""


def align(adapters: Sequence[Adapter], names: Sequence[str], any_base: bool = False) -> Aligned:
    """Return the deltas of all adapters by parameter name, in order of first appearance.

    Raises FormatError naming the first clash: different base models (unless `any_base`), a parameter fused in one and
    split in another, different shapes, or no parameter that two adapters share.
    """
    if not any_base:
        same_base(adapters, names)
    keys = list(dict.fromkeys(k for a in adapters for k in a.deltas))
    fused_or_split(adapters, names)
    for key in keys:
        shapes = [(n, _shape(a.deltas[key].shape)) for n, a in zip(names, adapters, strict=True) if key in a.deltas]
        for name, shape in shapes[1:]:
            if shape != shapes[0][1]:
                raise FormatError(f"{key}: shape {_text(shapes[0][1])} in {shapes[0][0]}, {_text(shape)} in {name}")
    deltas = {k: tuple(a.deltas.get(k) for a in adapters) for k in keys}
    if all(sum(d is not None for d in ds) < 2 for ds in deltas.values()):
        first = [f"{next(iter(a.deltas), 'no parameter')} in {n}" for n, a in zip(names, adapters, strict=True)]
        raise FormatError(f"no two inputs share a parameter: {', '.join(first)}",
                          hint="adapters for different models, or names that one dialect writes differently")
    notes = []
    for i, name in enumerate(names):
        lacks = sum(ds[i] is None for ds in deltas.values())
        if lacks:
            notes.append(f"{name} lacks {lacks} of {len(keys)} parameters, they count as zero")
    return Aligned(deltas, tuple(notes))


def same_base(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Raise FormatError when two adapters name different base models; quantised copies of one model are the same."""
    named = [(n, a.origin.base_model) for n, a in zip(names, adapters, strict=True) if a.origin.base_model]
    for name, base in named[1:]:
        if base_id(base) != base_id(named[0][1]):
            raise FormatError(f"base models differ: {named[0][1]} in {named[0][0]}, {base} in {name}",
                              hint="--any-base merges anyway, for one model under two names")


def base_id(name: str | None) -> str:
    """Return the model a name or path stands for: last component, without quantisation suffixes, lower case."""
    path = str(name or "").rstrip("/").replace("\\", "/")
    hub = re.search(r"models--(?:[^/]+?--)?([^/]+?)/snapshots/", path)
    return _COPIES.sub("", hub.group(1) if hub else path.rsplit("/", 1)[-1]).lower()


def fused_or_split(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Raise FormatError for the first parameter that one adapter has fused (qkv_proj) and another in parts (q_proj)."""
    parts: dict[str, tuple[str, str]] = {}
    for name, a in zip(names, adapters, strict=True):
        for key in a.deltas:
            parts.setdefault(key.rpartition(".")[0] or key, (name, key))
    for name, a in zip(names, adapters, strict=True):
        for key in a.deltas:
            module = key.removesuffix("_weight") if key.endswith("in_proj_weight") else key.rpartition(".")[0]
            parent, _, leaf = module.rpartition(".")
            for part in _FUSED.get(leaf, ()):
                other = parts.get(f"{parent}.{part}" if parent else part)
                if other and other[1] not in a.deltas:
                    raise FormatError(f"{key} in {name} is fused, {other[0]} has it split ({other[1]})",
                                      hint="bring both to one layout first")


def carry(adapters: Sequence[Adapter], names: Sequence[str], heads: str | None
          ) -> tuple[dict[str, Replacement], tuple[str, ...]]:
    """Return the replaced tensors (heads, norms, token rows) of the joined adapter, and notes.

    Identical ones and those that one adapter alone has are kept. Ones that differ raise UnsupportedError until `heads`
    says which to take: "first" that has it, "drop" none (and no bias without its weight), or the name of an input.
    """
    if heads is not None and heads not in ("first", "drop", *names):
        raise UsageError(f"heads is {heads}, must be first, drop, or an input ({', '.join(names)})")
    kept: dict[str, Replacement] = {}
    notes, differ = [], []
    for key in dict.fromkeys(k for a in adapters for k in a.replaced):
        held = [(n, a.replaced[key]) for n, a in zip(names, adapters, strict=True) if key in a.replaced]
        if all(_same(held[0][1], value) for _, value in held[1:]):
            kept[key] = held[0][1]
            if len(held) < len(adapters):
                notes.append(f"{key} kept, only {' and '.join(n for n, _ in held)} has it")
            continue
        differ.append(key)
        if heads is None:
            other = next(n for n, v in held if not _same(v, held[0][1]))
            raise UnsupportedError(f"{key} differs between {held[0][0]} and {other}",
                                   hint=f"--heads first, drop, or one of {', '.join(names)} says which to keep")
        chosen = dict(held).get(heads) if heads != "first" else held[0][1]
        if heads != "drop" and chosen is not None:
            kept[key] = chosen
    if heads == "drop":
        gone = {key.rpartition(".")[0] for key in differ}
        kept = {k: v for k, v in kept.items() if k.rpartition(".")[0] not in gone}
    if differ:
        notes.append(f"{len(differ)} replaced tensors differ ({differ[0]}, ...): "
                     + ("dropped" if heads == "drop" else f"those of {names[0] if heads == 'first' else heads} kept"))
    return kept, tuple(notes)


def _same(x: Replacement, y: Replacement) -> bool:
    if isinstance(x, Rows) and isinstance(y, Rows):
        return x.indices == y.indices and torch.equal(x.values, y.values)
    return not isinstance(x, Rows) and not isinstance(y, Rows) and torch.equal(x, y)


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without trailing ones beyond two axes: a 1x1 convolution is a linear layer."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
