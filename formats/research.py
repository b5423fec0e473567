"""Checkpoints of research code: SoRA gates, LoRA-XS and LoRA-SB cores, and AdaLoRA outside of PEFT. Read only.

All three are factors with something small between them, so they are read with that as the core of a low-rank delta, and
written as PEFT LoRA with the core folded into B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, NeedsError
from adaptc.formats.format import Evidence, Format
from adaptc.formats.lora_r import alpha_of
from adaptc.formats.peft import Peft
from adaptc.formats.peft_keys import strip
from adaptc.formats.peft_parts import pair
from adaptc.formats.source import Source

_LATENT = "default_lora_latent_mapping.weight"


class LoraXs(Format):
    """LoRA-XS (2405.17604) and LoRA-SB (2411.19557): dW = s B R A, R (r, r) trained, A and B frozen but stored."""

    id: ClassVar[str] = "lora-xs"
    title: ClassVar[str] = "LoRA-XS"
    writes: ClassVar[str] = ""

    def sniff(self, source: Source) -> Evidence | None:
        """Latent mappings among PEFT's keys; PEFT itself would take them for replaced modules and drop them."""
        found = next((k for k in source.tensors if k.endswith(_LATENT)), None)
        return Evidence(4, f"key {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter as PEFT reads it, with R between the factors."""
        cores = {f"{strip(k).removesuffix(_LATENT)}weight": t for k, t in source.tensors.items() if k.endswith(_LATENT)}
        if not any("lora_A" in k for k in source.tensors):
            raise NeedsError(f"{source.file.name}: stores {len(cores)} cores without their frozen A and B",
                             hint="save the adapter with lora_A and lora_B, the top singular vectors of the base")
        rest = _Without(source.path, source.file, source.config, source.alpha, _LATENT)
        read = Peft().read(rest)
        deltas = dict(read.deltas)
        for key, core in cores.items():
            d = deltas.get(key)
            if not isinstance(d, LowRank):
                raise FormatError(f"{key}: has a latent mapping but no lora_A and lora_B")
            if core.shape != (d.rank, d.rank):
                raise FormatError(f"{key}: latent mapping is {tuple(core.shape)}, the factors have rank {d.rank}")
            deltas[key] = replace(d, core=core)
        return replace(read, deltas=deltas, origin=replace(read.origin, notes=(
            *read.origin.notes, f"{len(cores)} latent mappings, written as plain LoRA with B R in the place of B")))


@dataclass(frozen=True)
class _Without(Source):
    """A source that hides the tensors whose keys end in `hidden`."""

    hidden: str = ""

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that are not hidden."""
        return {k: super(_Without, self).tensors[k] for k in super().tensors if not k.endswith(self.hidden)}


class _Gated(Format):
    """Factors with a vector between them: dW = s B diag(gate) A."""

    writes: ClassVar[str] = ""
    gate: ClassVar[str]
    stem: ClassVar[str]  # what stands between the module and its lora_A

    def sniff(self, source: Source) -> Evidence | None:
        """The name of the gate."""
        if "peft_type" in source.config:
            return None
        found = next((k for k in source.tensors if k.endswith(f".{self.stem}{self.gate}")), None)
        return Evidence(2, f"key {found}") if found else None

    def scale(self, alpha: float, rank: int, tensors: Mapping[str, Tensor]) -> float:
        """Return the multiplier of one module."""
        return alpha / rank

    def read(self, source: Source) -> Adapter:
        """Return the adapter; tensors beside the factors are replacements."""
        alpha = alpha_of(source, {}, "its training arguments")
        names = ("lora_A", "lora_B", self.gate, "ranknum")
        modules: dict[str, dict[str, Tensor]] = {}
        replaced: dict[str, Replacement] = {}
        for key, t in source.tensors.items():
            head, _, leaf = key.rpartition(".")
            if leaf in names and (not self.stem or f"{head}.".endswith(f".{self.stem}")):
                modules.setdefault(f"{head}.".removesuffix(self.stem).removesuffix("."), {})[leaf] = t
            else:
                replaced[key] = t
        deltas: dict[str, Delta] = {}
        for module, tensors in modules.items():
            a, b = pair(module, tensors, "lora_A", "lora_B")
            gate = tensors.get(self.gate)
            if gate is None or gate.numel() != a.shape[0] or a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
                shapes = {n: tuple(t.shape) for n, t in tensors.items()}
                raise FormatError(f"{module}: {self.gate} and factors do not fit each other: {shapes}")
            core = torch.diag(gate.flatten())
            deltas[f"{module}.weight"] = LowRank(a, b, core, self.scale(alpha, a.shape[0], tensors),
                                                 (b.shape[0], a.shape[1]))
        return Adapter(deltas, replaced, Origin(self.id, {"lora_alpha": alpha}, {}, None, source.files))


class SoRA(_Gated):
    """SoRA (2311.11696): lora.lora_A (r, in), lora.lora_B (out, r), lora.gate (1, r), s = alpha / r."""

    id: ClassVar[str] = "sora"
    title: ClassVar[str] = "SoRA"
    gate: ClassVar[str] = "gate"
    stem: ClassVar[str] = "lora."


class RawAdaLora(_Gated):
    """AdaLoRA (2303.10512) of its authors: lora_E (r, 1), s = alpha / (ranknum + 1e-5)."""

    id: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    gate: ClassVar[str] = "lora_E"
    stem: ClassVar[str] = ""

    def scale(self, alpha: float, rank: int, tensors: Mapping[str, Tensor]) -> float:
        """Return alpha over the number of ranks that training kept."""
        kept = tensors.get("ranknum")
        return alpha / ((rank if kept is None else float(kept)) + 1e-5)
