"""GGUF adapters of llama.cpp: lora_a and lora_b of every tensor in any of its types, the scale folded into lora_b."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.factor import decoded
from adaptc.formats.format import HISTORY_KEY, Content, Evidence, Format, history_metadata, read_history
from adaptc.formats.gguf_arch import FAMILIES, Target, gguf_name, parameter_name, row_order, target_of, target_of_header
from adaptc.formats.gguf_file import gguf_bytes, read_tensor
from adaptc.formats.gguf_pair import code_pair
from adaptc.formats.gguf_types import BY_ID, TYPES, BlockType
from adaptc.formats.peft_parts import pair
from adaptc.formats.source import Source
from adaptc.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from adaptc.lowrank import low_rank

_ALPHA = "adapter.lora.alpha"
_NAMES = "adaptc.names"  # JSON: llama.cpp's name -> the parameter's, where that is not the family's own
_OURS = ("general.", "adapter.", "adaptc.")


@dataclass(frozen=True)
class Gguf(Format):
    """llama.cpp's LoRA adapters. dW = lora_b lora_a, with alpha 0 written, which llama.cpp takes for no scale at all.

    `target` is the base model where it is known (it tells architecture and heads); without one, what the adapter's
    own file or base folder tells. `type_a`, `type_b`: tensor types; None is F16, or for a GGUF file what it had.
    The rows of q and k of some families are reordered by llama.cpp's converter, and those of lora_b with them.
    """

    id: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF"
    suffix: ClassVar[str] = ".gguf"

    target: Target | None = None
    type_a: str | None = None
    type_b: str | None = None

    def sniff(self, source: Source) -> Evidence | None:
        """The magic."""
        return Evidence(3, "magic GGUF") if source.magic[:4] == b"GGUF" else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter, under transformers' names and in its row order where the file or `target` tells both.

        Otherwise names and rows stay llama.cpp's, which is noted. Raises FormatError for a model and for damage.
        """
        header = read_gguf_header(source.file)
        facts = header.facts
        if facts.get("general.type") != "adapter" or facts.get("adapter.type", "lora") != "lora":
            raise FormatError(f"{source.file.name}: is a GGUF {facts.get('general.type', 'model')}, no LoRA adapter")
        halves: dict[str, dict[str, GgufTensor]] = {}
        for name, t in header.tensors.items():
            stem, _, leaf = name.rpartition(".")
            if leaf not in ("lora_a", "lora_b"):
                raise UnsupportedError(f"{source.file.name}: {name} is no lora_a or lora_b, llama.cpp ignores it too")
            halves.setdefault(stem, {})[leaf] = t
        target, notes = self._target_read(source, header)
        names = _noted(facts.get(_NAMES))
        deltas: dict[str, Delta] = {}
        layout, types = {}, {}
        for stem, both in halves.items():
            known = target is not None and (names.get(stem) or parameter_name(stem, target.family))
            key = known or stem
            deltas[key] = _delta(stem, both, facts.get(_ALPHA, 0.0), target if known else None)
            types[key] = [BY_ID[both[x].type].name for x in ("lora_a", "lora_b")]
            if stem == "token_embd.weight":
                layout[key] = "embedding"
        told = _heads(target) if target is not None else {}
        config = {"facts": told | {k: v for k, v in facts.items() if k != HISTORY_KEY}, "types": types,
                  "raw": target is None}
        base = facts.get("general.base_model.0.name")
        history = read_history({HISTORY_KEY: str(facts.get(HISTORY_KEY, "[]"))})
        return Adapter(deltas, {}, Origin("gguf", config, {}, base, source.files, {}, layout, notes), history)

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Factors of the weights that llama.cpp runs LoRA on; no norms, biases, heads or other tensors."""
        target = self._target_written(adapter)
        lost = [f"{k}: {why}" for k, d in adapter.deltas.items() if (why := _unsayable(k, d, adapter, target))]
        lost += [f"{k}: {'replaces rows only' if isinstance(r, Rows) else 'a full tensor'}, which llama.cpp's adapters "
                 "have not" for k, r in adapter.replaced.items()]
        return tuple(lost + [f"{k}: carried tensor that changes no weight" for k in adapter.extra])

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the one file. Raises NeedsError where the architecture, or heads that an order needs, are unknown."""
        target = self._target_written(adapter)
        tensors: dict[str, tuple[Tensor, BlockType]] = {}
        names = {}
        for key, d in adapter.deltas.items():
            if _unsayable(key, d, adapter, target):
                continue
            name = _name(key, adapter, target)
            assert name is not None
            made = self._coded(adapter, key, d, name, target)
            if made is None:
                continue
            tensors |= {f"{name}.{half}": t for half, t in made.items()}
            if not _raw(adapter) and parameter_name(name, target.family) != key:
                names[name] = key
        return {"": gguf_bytes(self._metadata(adapter, target, names), tensors)}

    def _coded(self, adapter: Adapter, key: str, d: Delta, name: str, target: Target
               ) -> dict[str, tuple[Tensor, BlockType]] | None:
        low = d if isinstance(d, LowRank) else low_rank(d)  # type: ignore[arg-type]
        assert low is not None
        if not low.rank:
            return None
        b, a = _folded(low, _alpha(adapter))
        order = None if _raw(adapter) else row_order(name, b.shape[0], target)
        if order is not None:
            b = b[order]
        if name == "token_embd.weight":
            b, a = a.mT, b.mT  # llama.cpp looks rows of (vocab, r) up, and multiplies them by (dim, r)
        had = adapter.origin.config.get("types", {}).get(key, ["f16", "f16"]) if _mine(adapter) else ["f16", "f16"]
        kinds = (self.type_a or had[0], self.type_b or had[1])
        if name == "token_embd.weight":  # both sides lie along the rank: codes of A would need it padded twice
            kinds = ("f16", "f16") if TYPES[kinds[0]].quantized or TYPES[kinds[1]].quantized else kinds
            sides = {"lora_a": (a.mT, TYPES[kinds[0]]), "lora_b": (b, TYPES[kinds[1]])}
            return {half: (_bytes(x, kind), kind) for half, (x, kind) in sides.items()}
        made = code_pair(b, a, *kinds)
        return {"lora_a": (made.a, made.type_a), "lora_b": (made.b, made.type_b)}

    def _target_read(self, source: Source, header: GgufHeader) -> tuple[Target | None, tuple[str, ...]]:
        told = self.target
        if told is None:
            try:
                told = target_of_header(header, source.file.name)
            except UnsupportedError as e:
                return None, (f"{e}: names and rows are llama.cpp's own",)
            beside = source.file.parent / "config.json"
            if told.heads is None and told.family.permutes and beside.is_file():
                told = target_of(beside)
        permuted = told.family.permutes and any(".attn_q." in n or ".attn_k." in n for n in header.tensors)
        if permuted and told.heads is None:
            return None, ("number of heads is not in the file: names and rows of q and k are llama.cpp's own "
                          "(the base's config.json beside it tells)",)
        return told, ()

    def _target_written(self, adapter: Adapter) -> Target:
        if self.target is not None:
            return self.target
        facts, base = adapter.origin.config.get("facts"), adapter.origin.base_model
        if _mine(adapter) and isinstance(facts, Mapping):
            if _raw(adapter):
                return Target(str(facts.get("general.architecture")))
            return target_of_header(GgufHeader(dict(facts), {}), "its file")
        if base and (Path(base) / "config.json").is_file():
            return target_of(Path(base))
        raise NeedsError(f"architecture of the base model{f' ({base})' if base else ''} is not known",
                         hint="--base with the model's folder (config.json) or GGUF file tells it: "
                              "adaptc export --gguf --base DIR")

    def _metadata(self, adapter: Adapter, target: Target, names: Mapping[str, str]) -> dict[str, str | int | float]:
        origin = adapter.origin
        facts: dict[str, str | int | float] = {
            "general.type": "adapter", "general.architecture": target.arch, "adapter.type": "lora",
            _ALPHA: _alpha(adapter), "general.quantization_version": 2}
        if origin.base_model:
            facts |= {"general.base_model.count": 1, "general.base_model.0.name": origin.base_model}
        facts |= _heads(target)
        if _mine(adapter):
            kept = {k: v for k, v in origin.config["facts"].items()
                    if k not in facts and isinstance(v, (str, int, float)) and not isinstance(v, bool)}
            facts |= {k: v for k, v in kept.items() if k.startswith(_OURS) and k != _NAMES}
        facts.setdefault("general.name", f"{origin.base_model} LoRA" if origin.base_model else "LoRA")
        if names:
            facts[_NAMES] = json.dumps(names, separators=(",", ":"))
        return {**facts, **history_metadata(adapter)}


def typed(fmt: Gguf, **options: Any) -> Gguf:
    """Return the format with other options. Raises UnsupportedError for a type that is not known."""
    for name in ("type_a", "type_b"):
        if options.get(name) is not None and options[name] not in TYPES:
            raise UnsupportedError(f"tensor type {options[name]} is not written (known: {', '.join(TYPES)})")
    return replace(fmt, **options)


def _heads(target: Target) -> dict[str, int]:
    """Return the facts by which the rows of q and k are brought back."""
    if target.heads is None or target.kv_heads is None:
        return {}
    return {f"{target.arch}.attention.head_count": target.heads,
            f"{target.arch}.attention.head_count_kv": target.kv_heads}


def _mine(adapter: Adapter) -> bool:
    return adapter.origin.dialect == "gguf"


def _raw(adapter: Adapter) -> bool:
    """Return whether names and rows are llama.cpp's own, because the file did not tell more."""
    return _mine(adapter) and bool(adapter.origin.config.get("raw"))


def _name(key: str, adapter: Adapter, target: Target) -> str | None:
    return key if _raw(adapter) else gguf_name(key, target.family)


def _alpha(adapter: Adapter) -> float:
    """Return the alpha to write: that of a GGUF file whose scales still are alpha over rank, else 0."""
    if not _mine(adapter):
        return 0.0
    alpha = float(adapter.origin.config["facts"].get(_ALPHA, 0.0))
    same = all(isinstance(d, LowRank) and d.rank and d.scale == (alpha / d.rank if alpha else 1.0)
               for d in adapter.deltas.values())
    return alpha if same else 0.0


def _folded(low: LowRank, alpha: float) -> tuple[Tensor, Tensor]:
    """Return float64 (b, a) as stored: core and scale in b, but for the part that `alpha` says."""
    if alpha:
        return decoded(low.b).double(), decoded(low.a).double()
    return low.factors()


def _bytes(x: Tensor, kind: BlockType) -> Tensor:
    return (torch.empty(x.shape[0], kind.row_bytes(x.shape[1]), dtype=torch.uint8) if x.is_meta
            else kind.encode(x.contiguous()))


def _noted(text: Any) -> dict[str, str]:
    try:
        names = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return names if isinstance(names, dict) and all(isinstance(v, str) and v for v in names.values()) else {}


def _delta(stem: str, both: Mapping[str, GgufTensor], alpha: Any, target: Target | None) -> LowRank:
    """Return the factors of one tensor. Raises FormatError for halves and shapes that disagree."""
    a, b = pair(stem, {half: read_tensor(f"{stem}.{half}", t) for half, t in both.items()}, "lora_a", "lora_b")
    if a.dim() != 2 or b.dim() != 2:
        raise FormatError(f"{stem}: lora_a has shape {tuple(a.shape)}, lora_b {tuple(b.shape)}, not matrices")
    if stem == "token_embd.weight":
        a, b = b.mT, a
    if a.shape[0] != b.shape[1]:
        raise FormatError(f"{stem}: lora_a has shape {tuple(a.shape)}, lora_b {tuple(b.shape)}, no common rank")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
        raise FormatError(f"{_ALPHA} is {alpha!r}, not a number")
    order = None if target is None else row_order(stem, b.shape[0], target)
    if order is not None:
        b = b[torch.argsort(order)]
    return LowRank(a, b, None, alpha / a.shape[0] if alpha and a.shape[0] else 1.0, (b.shape[0], a.shape[1]))


def _unsayable(key: str, d: Delta, adapter: Adapter, target: Target) -> str:
    if isinstance(d, NeedsBase):
        return (f"{d.kind} depends on the base weights, adaptc run 'resolve,truncate{{rank=32}}' IN OUT --base DIR "
                "makes factors of it")
    if not d.nbytes:
        return ""
    name = _name(key, adapter, target)
    if name is None:
        return f"llama.cpp runs no LoRA on this ({target.arch})"
    if name in ("output.weight", "token_embd.weight") and not _raw(adapter) and target.one_embedding:
        return ("the base's head is its embedding, llama.cpp has no tensor for it" if name == "output.weight" else
                "the base's embedding is its head too, which llama.cpp aborts on")
    if len(d.shape) != 2:
        return f"llama.cpp adapts no {len(d.shape)}-dimensional weight"
    if not isinstance(d, LowRank) and low_rank(d) is None:
        return f"{type(d).__name__.lower()} delta has no low-rank factors"
    return ""


__all__ = ["FAMILIES", "Gguf", "typed"]
