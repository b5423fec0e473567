"""Which module an adapter's parameter belongs to, exactly by name and shape, and what stands there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptc.adapter import Adapter
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.fingerprint import fingerprint
from adaptc.kernels.device import FLOATS
from adaptc.kernels.runtime_packed import PackedLinear
from adaptc.kernels.weight import Weight, nf4_from_bitsandbytes, plain_weight

Kind = Literal["linear", "conv1d", "embedding", "convolution", "packed", "bnb4", "bnb8"]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Their fast paths read the weights of layers inside them and never call those layers.
_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted module: its name, its kind, and its logical weight shape (out, in, ...)."""

    name: str
    module: Any
    kind: Kind
    shape: tuple[int, ...]

    @property
    def float_weight(self) -> Tensor | None:
        """The weight (out, in, ...) where it is held in floats, a view."""
        if self.kind in ("packed", "bnb4", "bnb8"):
            return None
        w: Tensor = self.module.weight.detach()
        return w.t() if self.kind == "conv1d" else w

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the weight, None for codes."""
        w = self.float_weight
        return None if w is None else w.dtype

    def weight(self) -> Weight | None:
        """Return the weight as the kernels read it, None where they cannot: the module's own forward then runs."""
        if self.kind == "linear":
            return plain_weight(self.module.weight.detach())
        if self.kind == "packed":
            packed: Weight = self.module.packed
            return packed
        if self.kind == "bnb4":
            return _bitsandbytes(self.module, (self.shape[0], self.shape[1]))
        return None


def site(model: nn.Module, key: str, leaf: str = "weight") -> Site:
    """Return the module that parameter `key` belongs to. Raises UnsupportedError naming layers that cannot run it."""
    name = key.rpartition(".")[0]
    module = model.get_submodule(name)
    parts = name.split(".")
    for i in range(len(parts)):
        above = ".".join(parts[:i])
        if isinstance(model.get_submodule(above), _OPAQUE):
            raise UnsupportedError(f"{key}: {above or 'the model'} reads this weight without calling {name}",
                                   hint="merge the adapter into the base instead")
    kind = _kind(module)
    if kind is None or not key.endswith((".weight", ".bias")):
        raise UnsupportedError(
            f"{key}: an adapter cannot run beside {type(module).__name__}",
            hint="nn.Linear, Conv1D, nn.Embedding, nn.Conv1d to 3d, bitsandbytes Linear4bit and PackedLinear work",
        )
    if kind in ("packed", "bnb4", "bnb8"):
        shape: tuple[int, ...] = (module.out_features, module.in_features)  # type: ignore[assignment]
    else:
        shape = tuple(module.weight.shape)[::-1] if kind == "conv1d" else tuple(module.weight.shape)  # type: ignore[arg-type]
        dtype = module.weight.dtype
        if dtype not in FLOATS:
            raise UnsupportedError(f"{key}: weight has dtype {dtype}, the kernels take float32, bfloat16 and float16")
    return Site(name, module, kind, shape)


def _kind(module: nn.Module) -> Kind | None:
    """Name the layer by the forward it runs: a subclass with its own may do anything."""
    home, forward = type(module).__module__, type(module).forward
    if isinstance(module, PackedLinear):
        return "packed"
    if home.startswith("bitsandbytes."):
        return {"Linear4bit": "bnb4", "LinearNF4": "bnb4", "LinearFP4": "bnb4", "Linear8bitLt": "bnb8"}.get(
            type(module).__name__)  # type: ignore[return-value]
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    if isinstance(module, _CONVS) and forward in (c.forward for c in _CONVS):
        return "convolution" if module.groups == 1 and module.padding_mode == "zeros" else None
    if home.startswith("transformers.") and type(module).__name__ == "Conv1D":
        return "conv1d"
    return None


def _bitsandbytes(module: Any, shape: tuple[int, int]) -> Weight | None:
    """Return the codes of a Linear4bit, None for other codes than NF4 in whole blocks of 64, or not yet quantised."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or state.blocksize != 64 or shape[1] % 64:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        return nf4_from_bitsandbytes(_from_cpu_packing(module.weight.detach(), shape), state.absmax.t(), shape, 64)
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    return nf4_from_bitsandbytes(module.weight.detach(), absmax, shape, state.blocksize)


def _from_cpu_packing(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes of a weight that bitsandbytes laid out for its own CPU kernel, row by row again: a copy.

    It does so in its first forward on a machine with AVX-512 and bfloat16: blocks of 32 rows, two columns at a time, of
    64 codes the first half in the low nibbles, and scales rounded to bfloat16 and transposed.
    """
    m, n = shape
    if m % 32:
        raise UnsupportedError(f"nf4 weight {m} x {n} is packed for 32 rows at a time")
    half = packed.view(torch.uint8).reshape(-1, 32)
    codes = torch.cat([half & 15, half >> 4], 1).view(m // 32, n // 2, 32, 2).transpose(1, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).reshape(m, n // 2)


def check_names(model: nn.Module, keys: Iterable[str], what: str = "parameter") -> None:
    """Raise NeedsError naming the first key that is no parameter or buffer of the model."""
    have = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    have |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    have |= {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    keys = list(keys)
    missing = [k for k in keys if k not in have]
    if missing:
        count = "" if len(missing) == 1 else f", nor {len(missing) - 1} others of {len(keys)}"
        raise NeedsError(f"{missing[0]}: the model has no such {what}{count}", hint=_hint(missing, have))


def _hint(missing: list[str], have: set[str]) -> str | None:
    """Say which part of the model the names would fit."""
    first = missing[0]
    longer = next((h for h in have if h.endswith("." + first)), None)
    if longer is not None and all(f"{longer[: -len(first)]}{k}" in have for k in missing):
        return f"its names fit model.{longer[: -len(first) - 1]}: attach to that"
    start = first
    while "." in start:
        start = start.split(".", 1)[1]
        prefix = first[: len(first) - len(start)]
        if all(k.startswith(prefix) and k[len(prefix) :] in have for k in missing):
            return f"its names carry the prefix {prefix!r} that this model lacks: pass prefix={prefix!r}"
    return f"the model has {min(have, default='no parameters')} and {max(len(have) - 1, 0)} others"


def check_shape(key: str, shape: tuple[int, ...], have: tuple[int, ...]) -> None:
    """Raise FormatError where a delta's shape contradicts the layer's (0 in a delta's shape is not known)."""
    flat = (have[0], math.prod(have[1:])) if len(shape) == 2 < len(have) else have
    if len(flat) != len(shape) or any(want not in (0, got) for want, got in zip(shape, flat, strict=True)):
        raise FormatError(f"{key}: adapter is for shape {shape}, the layer has {have}")


class ModelWeights:
    """The weights of a model as `fingerprint` reads them: by parameter name, in logical orientation."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites = sites

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return the float weight (out, in, ...) of `key`."""
        site = self.sites[key]
        w = site.module.bias.detach() if key.endswith(".bias") else site.float_weight
        if w is None:
            raise NeedsError(f"{key}: the layer holds codes, a fingerprint needs floats")
        return w.cpu()


def check_fingerprint(adapter: Adapter, sites: dict[str, Site]) -> None:
    """Raise FormatError where the model's weights are not those the adapter was made for.

    Only float32 and bfloat16 weights tell: quantised ones differ from any fingerprint, float16 rounds differently.
    """
    stored = adapter.origin.fingerprint
    if stored is None or set(sites) != set(adapter.deltas):
        return
    if any(s.dtype not in (torch.float32, torch.bfloat16) for s in sites.values()):
        return
    found = fingerprint(ModelWeights(sites), adapter)
    if found != stored:
        raise FormatError(f"the model's weights have fingerprint {found}, the adapter was made for {stored}")
