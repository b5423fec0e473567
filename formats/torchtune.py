"""torchtune: adapter_N.pt with lora_a.weight (r, in), lora_b.weight (out, r), magnitude; names of its own."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import FormatError
from adaptc.formats.config_json import read_config
from adaptc.formats.format import Evidence, read_history
from adaptc.formats.lora_r import alpha_of, one_rank
from adaptc.formats.peft_parts import pair
from adaptc.formats.source import Source
from adaptc.formats.torch_file import TorchFile

_NAMES = re.compile(r"(layers\.\d+\.|output\.|tok_embeddings\.|decoder\.|fusion_)")
_TUNED = re.compile(r"(.+)\.(lora_a\.weight|lora_b\.weight|magnitude)")


class Torchtune(TorchFile):
    """torchtune LoRA and DoRA. Scale alpha / r, from the adapter_config.json of the PEFT export beside it or --alpha.

    Names, and the row order of q and k (interleaved rotary halves), are torchtune's own and stay so: writing keeps
    lora_alpha, so only lora_rank of the recipe changes; ranks below the largest are padded with zeros.
    """

    id: ClassVar[str] = "torchtune"
    title: ClassVar[str] = "torchtune"

    def sniff(self, source: Source) -> Evidence | None:
        """Keys lora_a.weight: no other dialect has both the small letter and .weight."""
        found = next((k for k in source.tensors if k.endswith((".lora_a.weight", ".lora_b.weight"))), None)
        return Evidence(2, f"key {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; tensors beside the factors are replacements."""
        beside = source.file.parent / "adapter_config.json"
        config = dict(source.config or (read_config(beside) if beside.is_file() else {}))
        alpha = alpha_of(source, config, "the PEFT export's adapter_config.json")
        modules: dict[str, dict[str, Tensor]] = {}
        replaced = {}
        for key, t in source.tensors.items():
            m = _TUNED.fullmatch(key)
            if m is None:
                replaced[key] = t
            else:
                modules.setdefault(m[1], {})[m[2]] = t
        deltas: dict[str, Delta] = {}
        for module, tensors in modules.items():
            a, b = pair(module, tensors, "lora_a.weight", "lora_b.weight")
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise FormatError(f"{module}: lora_a is {tuple(a.shape)}, lora_b {tuple(b.shape)}, no common rank")
            shape = (b.shape[0], a.shape[1])
            inner = LowRank(a, b, None, alpha / a.shape[0], shape)
            if "magnitude" in tensors:
                if tensors["magnitude"].numel() != shape[0]:
                    raise FormatError(f"{module}: magnitude has {tensors['magnitude'].numel()} entries for {shape[0]}")
                magnitude = {"magnitude": tensors["magnitude"]}
                deltas[f"{module}.weight"] = NeedsBase("dora", magnitude, {"axis": 0}, shape, inner)
            else:
                deltas[f"{module}.weight"] = inner
        if any(k in deltas for k in replaced):
            raise FormatError(f"{next(k for k in replaced if k in deltas)}: both factors and a full weight")
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        base = config.get("base_model_name_or_path")
        origin = Origin("torchtune", {"lora_alpha": alpha}, metadata, base, source.files,
                        notes=("names and rotary row order are torchtune's own",))
        return Adapter(deltas, replaced, origin, read_history(source.metadata))

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """torchtune has its own names, linear layers only, and no scale of its own in the file."""
        lost = []
        for key, d in adapter.deltas.items():
            inner = d.inner if isinstance(d, NeedsBase) and d.kind == "dora" else d
            if not isinstance(inner, LowRank) or len(inner.shape) != 2 or not key.endswith(".weight"):
                lost.append(f"{key}: torchtune adapts linear layers by factors only")
            elif adapter.origin.dialect != "torchtune" and not _NAMES.match(key):
                lost.append(f"{key}: not a name of torchtune, and its rotary row order cannot be told from names")
        lost += [f"{k}: replaces rows only" for k, r in adapter.replaced.items() if isinstance(r, Rows)]
        return tuple(lost)

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return what is written, by file key."""
        lost = [why.partition(":")[0] for why in self.cannot(adapter)]
        inner = {k: d.inner if isinstance(d, NeedsBase) else d for k, d in adapter.deltas.items()
                 if d.nbytes and k not in lost}
        factors = {k: d for k, d in inner.items() if isinstance(d, LowRank) and d.rank}
        alpha = adapter.origin.config.get("lora_alpha") if adapter.origin.dialect == "torchtune" else None
        alpha = float(alpha) if alpha else max((d.scale * d.rank for d in factors.values()), default=1.0)
        tensors: dict[str, Tensor] = {}
        for key, (a, b) in one_rank(factors, alpha, uniform=True).items():
            module, delta = key.removesuffix(".weight"), adapter.deltas[key]
            tensors |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
            if isinstance(delta, NeedsBase):
                tensors[f"{module}.magnitude"] = delta.tensors["magnitude"]
        tensors |= {k: v for k, v in adapter.replaced.items() if isinstance(v, torch.Tensor)} | dict(adapter.extra)
        return tensors
