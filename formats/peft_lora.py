"""PEFT LoRA modules: tensors to deltas and back. Linear, Conv, Embedding, experts, lora_bias, DoRA, attention blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats import peft_scale

# State of training methods that leave plain factors behind: kept in the file, no part of the delta.
STATE = ("lora_monteclora_sampler.", "lora_velora_embed")


@dataclass
class Read:
    """What one tuned module became: parameter name -> delta, layout marks, carried state, notes."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    layout: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_module(module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
                tuned: Mapping[str, Mapping[str, Tensor]]) -> Read:
    """Return the deltas of one LoRA module. Raises FormatError for half pairs and shapes that disagree."""
    out = Read()
    known = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
             "lora_magnitude_vector", "lora_magnitude_vector.weight"}
    for name, t in tensors.items():
        if name.startswith(STATE):
            out.extra[f"{module}.{name}"] = t
        elif name not in known:
            raise UnsupportedError(f"{module}.{name}: not a known LoRA parameter")
    if "lora_embedding_A" in tensors or "lora_embedding_B" in tensors:
        _embedding(out, module, tensors, config)
        return out
    a, b = pair(module, tensors, "lora_A.weight", "lora_B.weight")
    target = _target(module, config, tuned)
    if target is not None:
        _experts(out, module, target, a, b, config)
        return out
    rank = a.shape[0]
    check_inner(module, a, b, rank)
    s = peft_scale.scale(config, module, rank)
    name = _parameter(module, tuned)
    if name.endswith("out_proj.weight") and ".base_layer" in module:
        s *= 2  # PEFT runs and merges the out_proj adapter of an nn.MultiheadAttention twice; so was it trained
        out.layout[name] = "attention_out"
        out.notes.append(f"{name}: PEFT applies this delta twice, its scale is {s:g}")
    shape = (b.shape[0], *a.shape[1:])
    delta: Delta = LowRank(a.flatten(1), b.flatten(1), None, s, shape)
    magnitude = tensors.get("lora_magnitude_vector.weight", tensors.get("lora_magnitude_vector"))
    if magnitude is not None:
        if magnitude.numel() != shape[0]:
            raise FormatError(f"{module}: lora_magnitude_vector has {magnitude.numel()} entries for {shape[0]} outputs")
        delta = NeedsBase("dora", {"magnitude": magnitude}, {"axis": 0}, shape, delta)
    elif config.get("use_dora"):
        raise FormatError(f"{module}: use_dora is set but lora_magnitude_vector is missing")
    out.deltas[name] = delta
    if "lora_B.bias" in tensors:
        bias = tensors["lora_B.bias"]
        out.deltas[name.removesuffix("weight") + "bias"] = Dense(bias, s, tuple(bias.shape))
    return out


def pair(module: str, tensors: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return both halves of a pair. Raises FormatError for half a pair and for shards that were never gathered."""
    for have, miss in ((first, second), (second, first)):
        if have in tensors and miss not in tensors:
            raise FormatError(f"{module}: {have} has no {miss}, half an adapter")
    if first not in tensors:
        raise FormatError(f"{module}: {first} is missing")
    for name in (first, second):
        t = tensors[name]
        if t.numel() == 0 or t.dim() < 2:
            raise FormatError(f"{module}.{name}: shape {tuple(t.shape)}, a ZeRO-3 or FSDP shard that was not gathered")
        if not t.dtype.is_floating_point:
            raise FormatError(f"{module}.{name}: dtype {str(t.dtype)[6:]} holds codes, not factors")
    return tensors[first], tensors[second]


def check_inner(module: str, a: Tensor, b: Tensor, rank: int) -> None:
    """Raise FormatError unless a (r, in, k...) and b (out, r, 1...) share the inner dimension."""
    if b.shape[1] != rank:
        raise FormatError(f"{module}: lora_B has rank {b.shape[1]}, lora_A has rank {rank}")
    if math.prod(b.shape[2:]) != 1:
        raise FormatError(f"{module}: lora_B has shape {tuple(b.shape)}, its kernel must be 1")


def _embedding(out: Read, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    a, b = pair(module, tensors, "lora_embedding_A", "lora_embedding_B")  # (r, vocab), (dim, r)
    check_inner(module, a, b, a.shape[0])
    shape = (a.shape[1], b.shape[0])
    name = f"{module}.weight"
    delta: Delta = LowRank(b.mT, a.mT, None, peft_scale.scale(config, module, a.shape[0]), shape)
    magnitude = tensors.get("lora_magnitude_vector.weight", tensors.get("lora_magnitude_vector"))
    if magnitude is not None:
        if magnitude.numel() != shape[1]:
            raise FormatError(f"{module}: lora_magnitude_vector has {magnitude.numel()} entries for {shape[1]} columns")
        delta = NeedsBase("dora", {"magnitude": magnitude}, {"axis": 1}, shape, delta)
    out.deltas[name] = delta
    out.layout[name] = "embedding"


def _target(module: str, config: Mapping[str, Any], tuned: Mapping[str, Any]) -> str | None:
    """Return the 3-D parameter (target_parameters) that this module path stands for, None for an ordinary module.

    Several parameters of one module nest: the first in registration order is innermost, so each ".base_layer" in the
    path counts one step back from the last.
    """
    owner, depth = module, 0
    while owner.endswith(".base_layer") or owner == "base_layer":
        owner, depth = owner.removesuffix("base_layer").removesuffix("."), depth + 1
    names = []
    for target in config.get("target_parameters") or []:
        path, _, leaf = str(target).rpartition(".")
        if path and (owner == path or owner.endswith(f".{path}")):
            names.append(leaf)
    if not names or depth >= len(names):
        return None
    return f"{owner}.{names[len(names) - 1 - depth]}"


def _experts(out: Read, module: str, name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> None:
    """3-D parameter (E, out, in): lora_A (r E, in) is expert-major, lora_B (out, r E) is rank-major, expert fastest."""
    r = int(peft_scale.number(config, "r", peft_scale.pattern(config.get("rank_pattern"), module, config.get("r"))))
    if r < 1 or a.shape[0] % r or b.shape[1] != a.shape[0]:
        raise FormatError(f"{module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no experts of rank {r}")
    e, (out_dim, in_dim) = a.shape[0] // r, (b.shape[0], a.shape[1])
    b3 = b.reshape(out_dim, r, e).permute(2, 0, 1)  # (E, out, r)
    delta = LowRank(a.reshape(e, r, in_dim), b3, None, peft_scale.scale(config, module, r), (e, out_dim, in_dim))
    out.deltas[name] = delta
    out.layout[name] = f"experts:{module}"


def _parameter(module: str, tuned: Mapping[str, Any]) -> str:
    """Return the parameter a module's factors change: in_proj_weight for an nn.MultiheadAttention, else .weight."""
    if f"{module}.base_layer.out_proj" in tuned:
        return f"{module}.in_proj_weight"
    return f"{module.replace('.base_layer', '')}.weight"


def write_module(name: str, delta: Delta, layout: str) -> tuple[str, int, float, dict[str, Tensor]]:
    """Return (module path, rank, scale, tensors by parameter) of one delta, the inverse of `read_module`."""
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    if not isinstance(inner, LowRank):
        raise UnsupportedError(f"{name}: {delta!r} is no LoRA pair")
    module, s = name.removesuffix(".weight").removesuffix(".in_proj_weight"), inner.scale
    a, b = factor(inner.a), factor(inner.b)
    if inner.core is not None:  # PEFT has no core: fold it into B, computed in float64
        b = (b.double() @ factor(inner.core).double()).to(b.dtype)
    if layout == "attention_out":
        module, s = module.removesuffix("out_proj") + "base_layer.out_proj", s / 2
    if layout.startswith("experts:"):
        e, out_dim, r = b.shape
        return layout.removeprefix("experts:"), r, s, {
            "lora_A.weight": a.reshape(e * r, -1), "lora_B.weight": b.permute(1, 2, 0).reshape(out_dim, r * e)}
    if layout == "embedding":
        made = {"lora_embedding_A": b.mT, "lora_embedding_B": a.mT}
    else:
        kernel = inner.shape[2:]
        made = {"lora_A.weight": a.reshape(a.shape[0], inner.shape[1], *kernel),
                "lora_B.weight": b.reshape(*b.shape, *(1 for _ in kernel))}
    if isinstance(delta, NeedsBase):
        made["lora_magnitude_vector"] = delta.tensors["magnitude"]
    return module, inner.rank, s, made


def factor(f: Any) -> Tensor:
    """Return a factor as a tensor of a dtype that files store: float64 becomes float32."""
    t: Tensor = f.decode() if not isinstance(f, Tensor) else f
    return t.float() if t.dtype == torch.float64 else t


Reader = Callable[[str, Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Mapping[str, Tensor]]], Read]
