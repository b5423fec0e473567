"""LyCORIS: LoCon, LoHa, LoKr, full differences and norms under kohya's flattened names, mixed freely in one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, Hadamard, Kron, LowRank, NeedsBase
from adaptc.factor import Encoded
from adaptc.formats import kohya_modules, lycoris_modules, tucker
from adaptc.formats.flatnames import kernel_of
from adaptc.formats.format import Evidence
from adaptc.formats.kohya import Kohya, is_flat, is_lycoris
from adaptc.formats.parts import joined
from adaptc.formats.source import Source
from adaptc.lowrank import plain


class Lycoris(Kohya):
    """Read and write every LyCORIS algorithm that adds to the weight; those that multiply it are refused by name.

    A file may mix algorithms, and loaders look at each module by itself: what a pass made low-rank is written as
    lora_down and lora_up beside LoHa and LoKr modules that were left alone.
    """

    id: ClassVar[str] = "lycoris"
    title: ClassVar[str] = "LyCORIS"
    network: ClassVar[str] = "lycoris.kohya"
    keep_mid: ClassVar[bool] = True

    def sniff(self, source: Source) -> Evidence | None:
        """ss_network_module lycoris, or hada_, lokr_, lora_mid, diff, norm keys under a flattened module name."""
        if not is_lycoris(source):
            return None
        module = source.metadata.get("ss_network_module", "")
        if module.startswith("lycoris"):
            return Evidence(3, f"metadata ss_network_module is {module}")
        keys = (k for k in source.tensors if is_flat(k) and kohya_modules.is_lycoris_parameter(k.partition(".")[2]))
        return Evidence(3 if module else 2, f"key {next(keys)}")

    def read_module(self, stem: str, tensors: Mapping[str, Tensor]) -> kohya_modules.Module:
        """Return what the tensors of one stem mean."""
        return lycoris_modules.read_module(stem, tensors)

    def finish(self, deltas: dict[str, Delta]) -> dict[str, Delta]:
        """Give convolutions of a UNet that are stored flat (LoHa, LoKr) their kernel back."""
        widths = [d.shape[1] for k, d in deltas.items() if k.endswith("attn2.to_k.weight")]
        return {key: _with_kernel(key, d, widths[0] if widths else None) for key, d in deltas.items()}

    def unwritable(self, leaf: str, inner: Any) -> str | None:
        """Every delta that adds to a weight or bias has a key here."""
        return "a bias change that is not dense has no key" if leaf == "bias" and len(inner.shape) != 1 else None

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter with codes decoded, but for Tucker factors, which this dialect has keys for."""
        return joined(adapter.map(lambda _, d: d if _is_tucker(d) else plain(d)))

    def write_delta(self, key: str, inner: Any, layout: str) -> tuple[dict[str, Tensor], float, int]:
        """Return (tensors by parameter, scale, rank): LoHa and LoKr as such, pairs as LoCon, the rest in full."""
        norm = layout == "norm"
        if key.endswith(".bias"):
            tensors, s, rank = lycoris_modules.write_delta(inner, norm=False)
            return {"b_norm" if norm else "diff_b": tensors["diff"]}, s, rank
        if isinstance(inner, (Kron, Hadamard)) or not kohya_modules.has_factors(inner):
            return lycoris_modules.write_delta(inner, norm)
        return super().write_delta(key, inner, layout)


def _is_tucker(delta: Delta) -> bool:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    return (isinstance(inner, LowRank) and tucker.unfold(inner.a) is not None
            and not any(isinstance(f, Encoded) for f in (inner.b, inner.core)))


def _with_kernel(key: str, delta: Delta, unet_width: int | None) -> Delta:
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    if len(delta.shape) != 2 or isinstance(inner, LowRank) or not isinstance(inner, (Kron, Hadamard)):
        return delta
    kernel = kernel_of(key.removesuffix(".weight"), delta.shape[1], unet_width)
    if not kernel:
        return delta
    shape = (delta.shape[0], delta.shape[1] // math.prod(kernel), *kernel)
    made: Delta = kohya_modules.reshaped(delta, shape)
    return made
