"""Sam_LoRA and LoRA-ViT: w_a_000, w_b_000, ...: q and v of a fused qkv, block after block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.format import Evidence, read_history
from adaptc.formats.parts import part_key
from adaptc.formats.peft_write import stored
from adaptc.formats.source import Source
from adaptc.formats.torch_file import TorchFile

_PAIR = re.compile(r"w_([ab])_(\d{3,})")
_FOREIGN = re.compile(r"w_[a-z]_.*")  # other trainers' w_c_000, w_a_000_bia, w_a_supp_000
_HEAD = re.compile(r"fc_\d+in_\d+out")
_PLACE = re.compile(r"(?:.+\.)?(\d+)\.attn\.qkv\.weight\[(\d+):\d+\]")


class SamVit(TorchFile):
    """q is rows [0, d) and v the last d of the fused qkv of 3 d rows; pair 2 i is q, pair 2 i + 1 v of block i.

    Scale 1 for Sam_LoRA. A LoRA-ViT file (known by its fc_*in_*out head) was trained with alpha // r, an integer
    division, and stores no alpha: pass --alpha. Both loaders take the tensors' own ranks. Writing folds the scale.
    """

    id: ClassVar[str] = "samvit"
    title: ClassVar[str] = "Sam_LoRA / LoRA-ViT"
    suffix: ClassVar[str] = ".safetensors"

    def sniff(self, source: Source) -> Evidence | None:
        """Keys w_a_NNN."""
        found = next((k for k in source.tensors if _PAIR.fullmatch(k)), None)
        return Evidence(2, f"key {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter. Raises FormatError for files whose saver lost one half."""
        halves: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
        replaced: dict[str, Replacement] = {}
        for key, t in source.tensors.items():
            m = _PAIR.fullmatch(key)
            if m:
                halves[m[1]][int(m[2])] = t
            elif _FOREIGN.fullmatch(key):
                raise UnsupportedError(f"{key}: belongs to a variant of LoRA-ViT that is not known")
            else:
                replaced[key] = t
        scale = _scale(source, halves["a"], any(_HEAD.fullmatch(k) for k in replaced))
        prefix = "blocks" if any(_HEAD.fullmatch(k) for k in replaced) else "image_encoder.blocks"
        _check(source.file.name, halves)
        deltas: dict[str, Delta] = {}
        layout: dict[str, str] = {}
        for i in sorted(halves["a"]):
            a, b = halves["a"][i], halves["b"][i]
            d = b.shape[0]
            start = 0 if i % 2 == 0 else 2 * d
            key = part_key(f"{prefix}.{i // 2}.attn.qkv.weight", start, start + d)
            deltas[key], layout[key] = LowRank(a, b, None, scale, (d, a.shape[1])), f"rows:{3 * d}"
        notes = (f"scale {scale:g}, pairs taken for q and v of blocks 0 to {max(halves['a']) // 2}",)
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        config = {"scale": scale, "prefix": prefix, "pairs": len(deltas)}
        origin = Origin("samvit", config, metadata, None, source.files, {}, layout, notes)
        return Adapter(deltas, replaced, origin, read_history(source.metadata))

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter as it is: this dialect is made of parts."""
        return adapter if adapter.origin.dialect == "samvit" else super().storable(adapter)

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Pairs of q and v of consecutive blocks, and heads."""
        lost = [f"{k}: no q or v of a transformer block, or no pair of factors" for k, d in adapter.deltas.items()
                if adapter.origin.dialect != "samvit" or not isinstance(d, LowRank)]
        return (*lost, *(f"{k}: replaces rows only" for k, r in adapter.replaced.items() if isinstance(r, Rows)))

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return w_a_NNN, w_b_NNN and the rest, at the scale of the file; an emptied pair is one zero direction."""
        scale = float(adapter.origin.config.get("scale", 1.0))
        out: dict[str, Tensor] = {}
        for key, d in adapter.deltas.items():
            place = _PLACE.fullmatch(key)
            if not isinstance(d, LowRank) or place is None:
                continue
            i = 2 * int(place[1]) + (place[2] != "0")
            a, b = stored(d) if d.rank else (torch.zeros(1, d.shape[1], dtype=d.dtype), torch.zeros(d.shape[0], 1,
                                                                                                    dtype=d.dtype))
            if d.scale != scale:
                b = (b.double() * (d.scale / scale)).to(b.dtype)
            out |= {f"w_a_{i:03d}": a, f"w_b_{i:03d}": b}
        return out | {k: v for k, v in adapter.replaced.items() if isinstance(v, Tensor)} | dict(adapter.extra)


def _scale(source: Source, halves: Mapping[int, Tensor], head: bool) -> float:
    if source.alpha is None:
        if head:
            raise NeedsError(f"{source.file.name}: a LoRA-ViT file does not store alpha, its scale is alpha // r",
                             hint="pass --alpha of the training run")
        return 1.0
    rank = next((t.shape[0] for t in halves.values() if t.dim() == 2), 0)
    scale = float(source.alpha // rank) if rank else 0.0
    if not scale:
        raise FormatError(f"{source.file.name}: alpha {source.alpha:g} // rank {rank} is 0, which changes nothing")
    return scale


def _check(file: str, halves: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Raise FormatError unless every pair 0, 1, 2, ... has both halves, in the same rank and shape."""
    for have, miss in ("ab", "ba"):
        lone = sorted(set(halves[have]) - set(halves[miss]))
        if lone:
            raise FormatError(f"{file}: w_{have}_{lone[0]:03d} has no w_{miss}_{lone[0]:03d}, half an adapter "
                              f"({len(lone)} of {len(halves[have])} pairs)")
    if sorted(halves["a"]) != list(range(len(halves["a"]))) or len(halves["a"]) % 2:
        raise FormatError(f"{file}: {len(halves['a'])} pairs, not q and v of every block from 0 on")
    for i, a in halves["a"].items():
        b = halves["b"][i]
        if not a.numel() or not b.numel() or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise FormatError(f"{file}: w_a_{i:03d} has shape {tuple(a.shape)}, w_b_{i:03d} {tuple(b.shape)}, no pair")
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            raise FormatError(f"{file}: w_a_{i:03d} and w_b_{i:03d} hold {str(a.dtype)[6:]} codes, not factors")
