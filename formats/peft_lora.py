"""PEFT LoRA modules read: Linear, Conv, Embedding, experts, lora_bias, DoRA, attention blocks, and the variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats import peft_scale
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_parts import Read, pair

# State of training methods that leave plain factors behind: kept in the file, no part of the delta.
STATE = ("lora_monteclora_sampler.", "lora_velora_embed")
# Initialisations that move the base, so that the factors alone are not the change, and cannot be repeated from W0.
_MOVED = {"pissa": "a randomised SVD of W0 without a seed", "corda": "a covariance-oriented part of W0",
          "lora_ga": "scaled gradient factors", "loftq": "the quantization error of W0"}
_KNOWN = frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
                    "lora_diag", "lora_magnitude_vector", "lora_magnitude_vector.weight"})


def lora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """Read a LoRA file. Raises NeedsError for initialisations that moved the base in a way no base can repeat."""
    init = str(config.get("init_lora_weights")).lower()
    moved = next((what for how, what in _MOVED.items() if init.startswith(how) and init != "pissa"), None)
    if moved is not None:
        raise NeedsError(f"init_lora_weights {init} subtracts {moved} from the base, factors alone are not the change",
                         hint="save with path_initial_model_for_weight_conversion, which writes plain LoRA of rank 2r")
    out = Read()
    for module, tensors in modules.tuned.items():
        _module(out, module, tensors, config, modules.tuned)
    for switch, note in (("layer_replication", "layer numbers count the replicated layers"),
                         ("alora_invocation_tokens", "active after its invocation tokens only, never merge it"),
                         ("arrow_config", "one expert of a routed set"),
                         ("megatron_config", "trained in parallel, shards must have been gathered")):
        if config.get(switch):
            out.notes.append(f"{switch}: {note}")
    return out


def _module(out: Read, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
            tuned: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, t in tensors.items():
        if name.startswith(STATE):
            out.extra[f"{module}.{name}"] = t
        elif name not in _KNOWN:
            raise UnsupportedError(f"{module}.{name}: not a known LoRA parameter")
    if all(name.startswith(STATE) for name in tensors):
        return
    if "lora_embedding_A" in tensors or "lora_embedding_B" in tensors:
        _embedding(out, module, tensors, config)
        return
    a, b = pair(module, tensors, "lora_A.weight", "lora_B.weight")
    target = _target(out, module, config)
    if target is not None:
        _experts(out, module, target, a, b, config)
        return
    owner, doubled = _attention(module, tuned)
    s = peft_scale.scale(config, owner, a.shape[0] // max(sum(map(bool, config.get("enable_lora") or [])), 1))
    a, b = _expanded(out, module, a, b, config)
    _check_inner(module, a, b, a.shape[0])
    if owner == module and module in _parents(tuned):
        name = f"{module}.in_proj_weight"
    else:
        name = f"{module.replace('.base_layer', '')}.weight"
    if doubled:
        s *= 2  # PEFT runs and merges the out_proj adapter of an nn.MultiheadAttention twice; so was it trained
        out.layout[name] = "attention_out"
        out.notes.append(f"{name}: PEFT applies this delta twice, its scale is {s:g}")
    shape = (b.shape[0], *a.shape[1:])
    inner = LowRank(a.flatten(1), b.flatten(1), None, s, shape)
    out.deltas[name] = _bound(module, tensors, inner, 0, config)
    if "lora_B.bias" in tensors:
        bias = tensors["lora_B.bias"]
        if bias.shape != (shape[0],):
            raise FormatError(f"{module}: lora_B.bias has shape {tuple(bias.shape)} for {shape[0]} outputs")
        out.deltas[name.removesuffix("weight") + "bias"] = Dense(bias, s, tuple(bias.shape))


def _bound(module: str, tensors: Mapping[str, Tensor], inner: LowRank, axis: int, config: Mapping[str, Any]) -> Delta:
    """Return the factors as they are, or as part of what changes the base: DoRA, PiSSA, OLoRA, KaSA."""
    magnitude = tensors.get("lora_magnitude_vector.weight", tensors.get("lora_magnitude_vector"))
    diag, init = tensors.get("lora_diag"), str(config.get("init_lora_weights")).lower()
    if magnitude is not None:
        if magnitude.numel() != inner.shape[axis]:
            have, need = magnitude.numel(), inner.shape[axis]
            raise FormatError(f"{module}: lora_magnitude_vector has {have} entries for {need} outputs")
        if init in ("pissa", "olora") or diag is not None:
            by = init if diag is None else "kasa"
            raise UnsupportedError(f"{module}: DoRA on a base that {by} moved is not read")
        return NeedsBase("dora", {"magnitude": magnitude}, {"axis": axis}, inner.shape, inner)
    if config.get("use_dora"):
        raise FormatError(f"{module}: use_dora is set but lora_magnitude_vector is missing")
    if diag is not None:
        if diag.shape != (inner.rank,):
            raise FormatError(f"{module}: lora_diag has shape {tuple(diag.shape)} for rank {inner.rank}")
        return NeedsBase("kasa", {"diag": diag}, {}, inner.shape, inner)
    if config.get("kasa_config") is not None:
        raise FormatError(f"{module}: kasa_config is set but lora_diag is missing")
    if init in ("pissa", "olora"):
        return NeedsBase(init, {}, {"scale": inner.scale}, inner.shape, inner)
    return inner


def _check_inner(module: str, a: Tensor, b: Tensor, rank: int) -> None:
    """Raise FormatError unless a (r, in, k...) and b (out, r, 1...) share the inner dimension."""
    if b.shape[1] != rank:
        raise FormatError(f"{module}: lora_B has rank {b.shape[1]}, lora_A has rank {rank}")
    if math.prod(b.shape[2:]) != 1:
        raise FormatError(f"{module}: lora_B has shape {tuple(b.shape)}, its kernel must be 1")


def _expanded(out: Read, module: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return plain factors of the variants that store them folded.

    enable_lora (PEFT before 0.3): lora_A holds one block of rows for each enabled part of a fused projection, lora_B
    the rows of those parts. use_qalora: inputs are pooled, A_eff = repeat(A, g) * (in/g) / g. use_bdlora: one factor is
    block-diagonal and stored as the column of its blocks.
    """
    enabled = [bool(e) for e in config.get("enable_lora") or []]
    if sum(enabled):
        parts = sum(enabled)
        r, rows = a.shape[0] // parts, b.shape[0] // parts
        if r * parts != a.shape[0] or rows * parts != b.shape[0] or b.shape[1] != r:
            raise FormatError(f"{module}: lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)} do not make {parts} parts")
        wide = b.new_zeros(len(enabled), rows, parts, r)
        for i, place in enumerate(p for p, on in enumerate(enabled) if on):
            wide[place, :, i] = b.flatten(1)[i * rows : (i + 1) * rows]
        out.notes.append(f"{module}: enable_lora written out, zero rows where it is false")
        return a, wide.reshape(-1, parts * r)
    if config.get("use_qalora"):
        g = int(peft_scale.number(config, "qalora_group_size", config.get("qalora_group_size", 16)))
        out.notes.append(f"{module}: pooled inputs of QALoRA written out, group {g}")
        return (a.double().repeat_interleave(g, 1) * (a.shape[1] / g)).to(a.dtype), b
    blocks = config.get("use_bdlora")
    if isinstance(blocks, Mapping):
        n, leaf = int(peft_scale.number(blocks, "nblocks", blocks.get("nblocks"))), module.rpartition(".")[2]
        if any(p in leaf for p in blocks.get("target_modules_bd_a") or []):
            a = torch.block_diag(*a.chunk(n))  # type: ignore[no-untyped-call]
        elif any(p in leaf for p in blocks.get("target_modules_bd_b") or []):
            b = torch.block_diag(*b.chunk(n))  # type: ignore[no-untyped-call]
    return a, b


def _embedding(out: Read, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    a, b = pair(module, tensors, "lora_embedding_A", "lora_embedding_B")  # (r, vocab), (dim, r)
    _check_inner(module, a, b, a.shape[0])
    name, shape = f"{module}.weight", (a.shape[1], b.shape[0])
    inner = LowRank(b.mT, a.mT, None, peft_scale.scale(config, module, a.shape[0]), shape)
    out.deltas[name] = _bound(module, tensors, inner, 1, config)
    out.layout[name] = "embedding"


def _target(out: Read, module: str, config: Mapping[str, Any]) -> str | None:
    """Return the 3-D parameter (target_parameters) that this module path stands for, None for an ordinary module.

    Several parameters of one module nest: the first in the module's own order is innermost, so each ".base_layer" in
    the path counts one step back from the last. Only the base knows that order; gate_up_proj comes before down_proj in
    every model, other names are taken in the order of the config, and a note says so.
    """
    owner, depth = module, 0
    while owner.endswith(".base_layer"):
        owner, depth = owner.removesuffix(".base_layer"), depth + 1
    names: list[str] = []
    for target in config.get("target_parameters") or []:
        path, _, leaf = str(target).rpartition(".")
        if (owner == path or owner.endswith(f".{path}")) and path and leaf not in names:
            names.append(leaf)
    if not names or depth >= len(names):
        return None
    if len(names) > 1:
        if set(names) == {"gate_up_proj", "down_proj"}:
            names = ["gate_up_proj", "down_proj"]
        else:
            out.notes.append(f"{module}: taken for {names[len(names) - 1 - depth]}, in the order of target_parameters")
    return f"{owner}.{names[len(names) - 1 - depth]}"


def _experts(out: Read, module: str, name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> None:
    """3-D parameter (E, out, in): lora_A (r E, in) is expert-major, lora_B (out, r E) is rank-major, expert fastest."""
    r = int(peft_scale.number(config, "r", peft_scale.pattern(config.get("rank_pattern"), name, config.get("r"))))
    if r < 1 or a.shape[0] % r or b.shape[1] != a.shape[0]:
        raise FormatError(f"{module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no experts of rank {r}")
    e, (out_dim, in_dim) = a.shape[0] // r, (b.shape[0], a.shape[1])
    s = peft_scale.scale(config, name, r)
    out.layout[name] = "experts"
    if e == 1:  # a 2-D parameter
        out.deltas[name] = LowRank(a, b, None, s, (out_dim, in_dim))
        return
    b3 = b.reshape(out_dim, r, e).permute(2, 0, 1)  # (E, out, r)
    out.deltas[name] = LowRank(a.reshape(e, r, in_dim), b3, None, s, (e, out_dim, in_dim))


def _attention(module: str, tuned: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the module whose patterns count, and whether this is the out_proj of an nn.MultiheadAttention."""
    owner = module.removesuffix(".base_layer.out_proj")
    return (owner, True) if owner != module and owner in tuned else (module, False)


def _parents(tuned: Mapping[str, Any]) -> set[str]:
    return {m.removesuffix(".base_layer.out_proj") for m in tuned if m.endswith(".base_layer.out_proj")}
