"""ONNX Runtime GenAI: adapter_weights.npz, lora_A (in, r), lora_B (r, out), the scale folded into B."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, UnsupportedError, UsageError
from adaptc.formats.format import Content, Evidence, Format
from adaptc.formats.peft_parts import pair
from adaptc.formats.peft_write import stored
from adaptc.formats.source import Source

_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_A.MatMul.weight", ".lora_B.MatMul.weight")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same tensors, whenever they are written


class OrtGenai(Format):
    """ORT GenAI and Olive adapters as npz archives. Scale 1; names are the ONNX model's own (attn, not self_attn).

    A compressed file has another rank than the graph it was exported with: load it on a model whose adapter inputs
    have a dynamic rank.
    """

    id: ClassVar[str] = "ort"
    title: ClassVar[str] = "ONNX Runtime GenAI"
    suffix: ClassVar[str] = ".npz"

    def sniff(self, source: Source) -> Evidence | None:
        """An npz archive with lora_A keys, or ONNX Runtime's own flatbuffer."""
        if source.magic[4:8] == b"TORT":
            return Evidence(3, "flatbuffer identifier TORT")
        found = next((k for k in source.tensors if k.endswith(_ENDS)), None) if source.file.suffix == ".npz" else None
        return Evidence(3, f"npz archive with {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter. Raises UnsupportedError for the flatbuffer container and for quantized factors."""
        if source.magic[4:8] == b"TORT":
            raise UnsupportedError(f"{source.file.name}: ONNX Runtime's flatbuffer adapters are not read",
                                   hint="the npz file it was converted from is")
        modules: dict[str, dict[str, Tensor]] = {}
        stems: dict[str, str] = {}
        for key, t in source.tensors.items():
            if ".quant." in key:
                raise UnsupportedError(f"{key}: quantized factors of Olive are not read")
            end = next((e for e in _ENDS if key.endswith(e)), None)
            if end is None:
                raise UnsupportedError(f"{key}: no lora_A or lora_B, not part of an ORT GenAI adapter that is known")
            half, _, rest = end[1:].partition(".")
            module = key.removesuffix(end)
            modules.setdefault(module, {})[half] = t
            stems[f"{module}.weight"] = rest
        deltas: dict[str, Delta] = {}
        for module, tensors in modules.items():
            a, b = pair(module, tensors, "lora_A", "lora_B")
            if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
                raise FormatError(f"{module}: lora_A is {tuple(a.shape)}, lora_B {tuple(b.shape)}, no common rank")
            shape = (b.shape[1], a.shape[0])
            if a.shape[1] > max(shape):
                raise FormatError(f"{module}: reads as rank {a.shape[1]} on a {shape[0]} x {shape[1]} weight, "
                                  "these factors are not in ONNX's order")
            deltas[f"{module}.weight"] = LowRank(a.mT, b.mT, None, 1.0, shape)
        names = {k: v for k, v in stems.items() if v != "weight"}
        return Adapter(deltas, {}, Origin("ort", {}, {}, None, source.files, names,
                                          notes=("scale 1, folded into lora_B when it was exported",)))

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Plain factors of matrices only, and names of the ONNX model."""
        lost = []
        for key, d in adapter.deltas.items():
            if not isinstance(d, LowRank) or len(d.shape) != 2 or not key.endswith(".weight"):
                lost.append(f"{key}: ORT GenAI adapts matrices by factors only")
            elif ".self_attn." in key:
                lost.append(f"{key}: ONNX models of ORT GenAI call this attn, export with their builder")
        lost += [f"{k}: {'replaces rows only' if isinstance(r, Rows) else 'a full weight'}, no factors"
                 for k, r in adapter.replaced.items()]
        return tuple(lost)

    def write(self, adapter: Adapter, out: Path) -> None:
        """Write the archive. Raises UsageError for a name that its readers would not take for one."""
        if out.suffix != self.suffix:
            raise UsageError(f"{self.title} adapters are npz archives, {out.name} is not called so")
        super().write(adapter, out)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the archive, uncompressed, its size known without the values."""
        lost = {why.partition(":")[0] for why in self.cannot(adapter)}
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
            for key, d in adapter.deltas.items():
                if not isinstance(d, LowRank) or not d.rank or key in lost:
                    continue
                module, rest = key.removesuffix(".weight"), adapter.origin.names.get(key, "weight")
                a, b = stored(d)
                if d.scale != 1.0:
                    b = (b.double() * d.scale).to(b.dtype)
                for half, t in (("lora_A", a.mT), ("lora_B", b.mT)):
                    z.writestr(zipfile.ZipInfo(f"{module}.{half}.{rest}.npy", _EPOCH), _npy(t))
        return {"": out.getvalue()}


def _npy(t: Tensor) -> bytes:
    plain = torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.contiguous()
    out = io.BytesIO()
    np.save(out, (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())
    return out.getvalue()
