"""Microsoft loralib and LitGPT: lora_A, lora_B without .weight, fused projections stored group by group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.flat_yaml import Scalar, read_flat_yaml
from adaptc.formats.format import Evidence, read_history
from adaptc.formats.lora_r import alpha_of, one_rank
from adaptc.formats.mlx import EMBEDDINGS
from adaptc.formats.parts import part_key, split_part
from adaptc.formats.peft_parts import pair
from adaptc.formats.source import Source
from adaptc.formats.torch_file import TorchFile

_TUNED = re.compile(r"(.+)\.(lora_A|lora_B)")


class Loralib(TorchFile):
    """loralib's Linear, Embedding and MergedLinear; LitGPT's lit_model.pth.lora.

    dW = alpha / r B A. A MergedLinear of g groups stores A (g r, in), B (sum of rows, r): group i is B_i A_i on its own
    rows of the fused weight, so each group is a part (adaptc.formats.parts) that keeps its own rank. Which rows is
    known for three groups of equal size and from LitGPT's configs; else the groups are compressed and written back,
    but not converted. ConvLoRA stores r times the kernel size where others store r, which no shape tells: modules that
    are called conv are refused, and no other convolution may be read with this.
    """

    id: ClassVar[str] = "loralib"
    title: ClassVar[str] = "loralib"

    def sniff(self, source: Source) -> Evidence | None:
        """Keys that end in lora_A or lora_B, without the lora_E of AdaLoRA or the gate of SoRA beside them."""
        keys = [k for k in source.tensors if k.endswith((".lora_A", ".lora_B"))]
        others = (".lora_E", ".lora.gate", ".gate")
        if not keys or "peft_type" in source.config or any(k.endswith(others) for k in source.tensors):
            return None
        return Evidence(2, f"key {keys[0]}")

    def read(self, source: Source) -> Adapter:
        """Return the adapter; biases and heads beside the factors are replacements."""
        folder = source.file.parent
        told = read_flat_yaml(folder / "hyperparameters.yaml") | read_flat_yaml(folder / "model_config.yaml")
        alpha = alpha_of(source, told, "LitGPT's hyperparameters.yaml")
        modules: dict[str, dict[str, Tensor]] = {}
        replaced = {}
        for key, t in source.tensors.items():
            m = _TUNED.fullmatch(key)
            if m is None:
                replaced[key] = t
            else:
                modules.setdefault(m[1], {})[m[2]] = t
        deltas: dict[str, Delta] = {}
        layout: dict[str, str] = {}
        for module, tensors in modules.items():
            if "conv" in module.rpartition(".")[2].lower() or f"{module}.conv.bias" in replaced:
                raise UnsupportedError(f"{module}: ConvLoRA stores rank times kernel size, and the file tells neither")
            a, b = pair(module, tensors, "lora_A", "lora_B")
            _module(module, a, b, alpha, told, deltas, layout)
        if any(k in deltas for k in replaced):
            raise FormatError(f"{next(k for k in replaced if k in deltas)}: both factors and a full weight")
        wrapped = isinstance(source.payload, Mapping) and next((w for w in ("model", "state_dict")
                                                               if isinstance(source.payload.get(w), Mapping)), None)
        config = {"lora_alpha": alpha, "wrapper": wrapped or None}
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        origin = Origin("loralib", config, metadata, None, source.files, {}, layout)
        return Adapter(deltas, replaced, origin, read_history(source.metadata))

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter as it is: this dialect knows parts."""
        return adapter if adapter.origin.dialect == "loralib" else super().storable(adapter)

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """loralib has factors of linear layers and embeddings only."""
        lost = [f"{k}: loralib adapts linear layers and embeddings by factors only" for k, d in adapter.deltas.items()
                if not isinstance(d, LowRank) or len(d.shape) != 2 or not split_part(k)[0].endswith(".weight")]
        lost += [f"{k}: replaces rows only" for k, r in adapter.replaced.items() if isinstance(r, Rows)]
        if adapter.origin.dialect != self.id and adapter.deltas:
            lost.append(f"the scale: loralib's files hold none, this one is read with --alpha {_alpha(adapter):.17g}")
        return tuple(lost)

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return what is written, by file key: alpha stays, the groups of a module share its largest rank."""
        lost = [why.partition(":")[0] for why in self.cannot(adapter)]
        factors = {k: d for k, d in adapter.deltas.items() if isinstance(d, LowRank) and k not in lost}
        owners: dict[str, list[str]] = {}
        for key in factors:
            owners.setdefault(split_part(key)[0].removesuffix(".weight"), []).append(key)
        alpha = _alpha(adapter)
        out: dict[str, Tensor] = {}
        for module, keys in owners.items():
            rank = max(factors[k].rank for k in keys)
            if not rank:
                continue
            pairs = [one_rank({k: factors[k], "": _empty(rank)}, alpha, True)[k] if factors[k].rank
                     else _zeros(factors[k], rank) for k in keys]
            if adapter.origin.layout.get(keys[0]) == "embedding":
                pairs = [(b.mT, a.mT) for a, b in pairs]
            out |= {f"{module}.lora_A": torch.cat([a for a, _ in pairs]) if len(pairs) > 1 else pairs[0][0],
                    f"{module}.lora_B": torch.cat([b for _, b in pairs]) if len(pairs) > 1 else pairs[0][1]}
        return out | {k: v for k, v in adapter.replaced.items() if isinstance(v, Tensor)} | dict(adapter.extra)

    def wrapper(self, adapter: Adapter) -> str | None:
        """Return the level LitGPT and Lightning put around the tensors."""
        return adapter.origin.config.get("wrapper") if adapter.origin.dialect == "loralib" else None


def _alpha(adapter: Adapter) -> float:
    """Return lora_alpha of the file that is written: as it was, else the largest scale * rank."""
    given = adapter.origin.config.get("lora_alpha") if adapter.origin.dialect == "loralib" else None
    scales = [d.scale * d.rank for d in adapter.deltas.values() if isinstance(d, LowRank) and d.rank]
    return float(given) if given else max(scales, default=1.0) or 1.0


def _empty(rank: int) -> LowRank:
    """Return factors of this rank on nothing: they set the rank that others are padded to."""
    return LowRank(torch.empty(rank, 0), torch.empty(0, rank), None, 1.0, (0, 0))


def _zeros(d: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rank, d.shape[1], dtype=d.dtype), torch.zeros(d.shape[0], rank, dtype=d.dtype)


def _module(module: str, a: Tensor, b: Tensor, alpha: float, told: Mapping[str, Scalar], deltas: dict[str, Delta],
            layout: dict[str, str]) -> None:
    """Put the deltas of one module, one a group. Raises FormatError where the groups do not come out even."""
    name = f"{module}.weight"
    if a.dim() != 2 or b.dim() != 2 or not b.shape[1] or a.shape[0] % b.shape[1]:
        raise FormatError(f"{module}: lora_A has shape {tuple(a.shape)}, lora_B {tuple(b.shape)}, no common rank")
    r, groups = b.shape[1], a.shape[0] // b.shape[1]
    scale = alpha / r
    if groups == 1:
        embedding = module.rpartition(".")[2] in EMBEDDINGS
        left, right = (a.mT, b.mT) if embedding else (b, a)
        deltas[name] = LowRank(right, left, None, scale, (left.shape[0], right.shape[1]))
        if embedding:
            layout[name] = "embedding"
        return
    sizes, places, total = _rows(module, b.shape[0], groups, a.shape[1], told)
    at = 0
    for i, size in enumerate(sizes):
        start = places[i] if places else None
        key = part_key(name, start, start + size) if start is not None else f"{name}[part {i}]"
        layout[key] = f"rows:{total}" if start is not None else "part"
        deltas[key] = LowRank(a[i * r : (i + 1) * r], b[at : at + size], None, scale, (size, a.shape[1]))
        at += size


def _rows(module: str, rows: int, groups: int, width: int, told: Mapping[str, Scalar]
          ) -> tuple[list[int], list[int] | None, int]:
    """Return (rows of each group, where each starts in the fused weight or None, rows of the fused weight)."""
    heads, kv, size = (told.get(k) for k in ("n_head", "n_query_groups", "head_size"))
    if isinstance(heads, int) and module.endswith(".attn.qkv"):
        size = size if isinstance(size, int) else width // heads
        kv = kv if isinstance(kv, int) else heads
        full = [heads * size, kv * size, kv * size]
        on = [bool(told.get(k)) for k in ("lora_query", "lora_key", "lora_value")] if groups < 3 else [True] * 3
        sizes = [n for n, used in zip(full, on, strict=True) if used]
        if len(sizes) == groups and sum(sizes) == rows:
            starts = [sum(full[:i]) for i, used in enumerate(on) if used]
            return sizes, starts, sum(full)
        raise FormatError(f"{module}: lora_B has {rows} rows in {groups} groups, its configs say {sum(sizes)}")
    if rows % groups or (module.endswith(".attn.qkv") and rows != groups * width):
        raise FormatError(f"{module}: {rows} rows in {groups} groups, their sizes need model_config.yaml")
    size = rows // groups
    known = groups == 3 and not module.endswith(".attn.attn")  # LitGPT's old fused weight interleaves its groups
    return [size] * groups, [0, size, 2 * size] if known else None, rows if known else 0
