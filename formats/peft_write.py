"""PEFT LoRA written: deltas to tensors and config that PEFT itself reloads."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import UnsupportedError
from adaptc.factor import decoded
from adaptc.formats import peft_shira
from adaptc.formats.peft_config import Draft, config_of, module_of
from adaptc.formats.peft_keys import PREFIX
from adaptc.formats.peft_loss import is_bias, loss, state_of, verbatim
from adaptc.lowrank import low_rank


def build(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by file key and the config. Deltas that `peft_loss` names are left out."""
    if verbatim(adapter):
        names = adapter.origin.names
        return {names.get(k, PREFIX + k): v.values if isinstance(v, Rows) else v
                for k, v in adapter.replaced.items()}, dict(adapter.origin.config)
    r = peft_shira.rank_of(adapter)
    if r is not None:
        return peft_shira.build(adapter, r)
    draft, layout = Draft(), adapter.origin.layout
    experts: dict[str, list[tuple[str, LowRank]]] = {}
    attention: dict[str, LowRank] = {}
    biases: list[str] = []
    for key, delta in adapter.deltas.items():
        if loss(adapter, key, delta):
            continue
        if is_bias(key, adapter.deltas):
            biases.append(key)
            continue
        inner = _factors(delta)
        if layout.get(key) == "attention_out":
            attention[key.removesuffix(".out_proj.weight")] = inner
        elif not inner.rank:
            draft.dropped.append(key)
        elif layout.get(key) == "experts" or len(inner.a.shape) == 3:
            experts.setdefault(key.rpartition(".")[0], []).append((key, inner))
        else:
            _plain(draft, key, delta, inner, layout.get(key, ""))
    for owner, stack in experts.items():
        _experts(draft, owner, stack)
    for owner, inner in attention.items():
        _attention_out(draft, owner, inner)
    if biases:
        _biases(draft, adapter)
    state = state_of(adapter)
    draft.tensors |= {PREFIX + k: t for k, t in state.items()}
    draft.tensors |= {_key(adapter, draft, name): value.values if isinstance(value, Rows) else value
                      for name, value in adapter.replaced.items()}
    return draft.tensors, config_of(adapter, draft, bool(biases), bool(state))


def _factors(delta: Delta) -> LowRank:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    made = inner if isinstance(inner, LowRank) or inner is None else low_rank(inner)
    if not isinstance(made, LowRank):
        raise UnsupportedError(f"{delta!r} has no low-rank factors")
    return made


def stored(inner: LowRank) -> tuple[Tensor, Tensor]:
    """Return (a, b) in dtypes that files store: a core folded into b in float64, float64 cast to float32."""
    a, b = decoded(inner.a), decoded(inner.b)
    if inner.core is not None:
        kept = b.dtype
        b = b.double() @ decoded(inner.core).double()
        b = b.to(kept)
    return tuple(t.float() if t.dtype == torch.float64 else t for t in (a, b))  # type: ignore[return-value]


def _plain(draft: Draft, key: str, delta: Delta, inner: LowRank, layout: str) -> None:
    module = module_of(key)
    a, b = stored(inner)
    if layout == "embedding":
        made = {"lora_embedding_A": b.mT, "lora_embedding_B": a.mT}
    else:
        kernel = inner.shape[2:]
        made = {"lora_A.weight": a.reshape(a.shape[0], inner.shape[1], *kernel),
                "lora_B.weight": b.reshape(*b.shape, *(1 for _ in kernel))}
    if isinstance(delta, NeedsBase) and delta.kind == "dora":
        made["lora_magnitude_vector"] = delta.tensors["magnitude"]
    if isinstance(delta, NeedsBase) and delta.kind == "kasa":
        made["lora_diag"] = delta.tensors["diag"]
    draft.modules.append(module)
    draft.wrapped.add(module)
    draft.settings[module] = (a.shape[0], inner.scale)
    draft.tensors |= {f"{PREFIX}{module}.{p}": t for p, t in made.items()}


def _experts(draft: Draft, owner: str, stack: list[tuple[str, LowRank]]) -> None:
    """Nest the parameters of one module: the first is innermost. See peft_lora for the layout of the factors."""
    for depth, (key, inner) in enumerate(reversed(stack)):
        a, b = stored(inner)
        if a.ndim == 3:
            e, out_dim, r = b.shape
            a, b = a.reshape(e * r, -1), b.permute(1, 2, 0).reshape(out_dim, r * e)
        path = owner + ".base_layer" * depth
        draft.tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        draft.settings[key] = (inner.rank, inner.scale)
    draft.wrapped.add(owner)
    draft.parameters += [key for key, _ in stack]


def _attention_out(draft: Draft, owner: str, inner: LowRank) -> None:
    """Write the out_proj of an nn.MultiheadAttention: PEFT gives it the rank and alpha of in_proj and applies it twice.

    The side of smaller rank is padded with zeros, down to a side that nothing is left of.
    """
    a, b = stored(inner)
    in_a, in_b = (draft.tensors.get(f"{PREFIX}{owner}.lora_{x}.weight") for x in "AB")
    half = inner.scale / 2
    s = draft.settings[owner][1] if owner in draft.settings else half
    if in_a is None or in_b is None:
        if not inner.rank:
            return
        in_a, in_b = a.new_zeros(0, a.shape[1]), b.new_zeros(3 * b.shape[0], 0)
        draft.dropped.remove(f"{owner}.in_proj_weight")
        draft.modules.append(owner)
    if s != half:
        b = (b.double() * (half / s)).to(b.dtype)
    rank = max(a.shape[0], in_a.shape[0])
    draft.settings[owner] = (rank, s)
    draft.wrapped |= {owner, f"{owner}.out_proj"}
    for path, (fa, fb) in ((owner, (in_a, in_b)), (f"{owner}.base_layer.out_proj", (a, b))):
        draft.tensors[f"{PREFIX}{path}.lora_A.weight"] = _padded(fa, rank, 0)
        draft.tensors[f"{PREFIX}{path}.lora_B.weight"] = _padded(fb, rank, 1)


def _padded(t: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - t.shape[axis]
    if not missing:
        return t
    return torch.cat([t, t.new_zeros([missing if i == axis else n for i, n in enumerate(t.shape)])], axis)


def _biases(draft: Draft, adapter: Adapter) -> None:
    """Write bias changes as lora_B.bias, scaled as the factors beside them; modules without one get zeros."""
    for module in draft.modules:
        delta = adapter.deltas.get(f"{module}.bias")
        b = draft.tensors.get(f"{PREFIX}{module}.lora_B.weight")
        if isinstance(delta, Dense):
            bias, s = decoded(delta.weight), draft.settings[module][1]
            if delta.scale != s and s:
                bias = (bias.double() * (delta.scale / s)).to(bias.dtype)
            draft.tensors[f"{PREFIX}{module}.lora_B.bias"] = bias.float() if bias.dtype == torch.float64 else bias
        elif b is not None:
            draft.tensors[f"{PREFIX}{module}.lora_B.bias"] = b.new_zeros(b.shape[0])


def _key(adapter: Adapter, draft: Draft, name: str) -> str:
    """Return the file key of a replacement: that of the file it came from as long as the same modules are wrapped."""
    module, _, leaf = name.rpartition(".")
    given = adapter.origin.names.get(name) if adapter.origin.dialect == "peft" else None
    if given is not None:
        bare = given.removeprefix(PREFIX)
        owners = [bare[: m.start()].replace(".base_layer", "") for m in re.finditer(r"\.base_layer\.", bare)]
        return given if all(o in draft.wrapped for o in owners) else PREFIX + name
    if isinstance(adapter.replaced[name], Rows):
        return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in draft.wrapped else PREFIX + name
