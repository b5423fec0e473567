"""What an adapter feeds into slots: factors in ONNX's order, codes, gains, and the tensors it carries whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.delta import BaseFree, Delta, LowRank, NeedsBase, Sparse
from adaptc.errors import AdaptcError, FormatError, NeedsError, UnsupportedError
from adaptc.factor import decoded
from adaptc.formats.onnx.codes import CODES, decode, encode
from adaptc.formats.onnx.linear import FLOAT16
from adaptc.formats.onnx.model import Array, onnx_module
from adaptc.formats.onnx.slots import Slot
from adaptc.lowrank import low_rank
from adaptc.measure import relative_error
from adaptc.spectral import Spectral

Weight = Callable[[str], Tensor]  # parameter -> base weight (out, in)


@dataclass(frozen=True)
class Fed:
    """Arrays by input name, and the relative error of dW they stand for (0 for floats wide enough)."""

    arrays: dict[str, Array]
    error: float


def inner(delta: Delta) -> BaseFree:
    """Return the part of a delta that is a plain change. Raises NeedsError for one that base weights decide alone."""
    if not isinstance(delta, NeedsBase):
        return delta
    if delta.kind != "dora" or delta.inner is None or int(delta.config.get("axis", 0)):
        raise NeedsError(f"{delta.kind} changes the base weight itself",
                         hint="pass --weights with the folder of the base's safetensors, and --merge disk")
    return delta.inner


def is_full(delta: Delta) -> bool:
    """Return whether a change has no factors, but few enough numbers to be expanded into a matrix at load."""
    return isinstance(inner(delta), Sparse | Spectral)


def factors(key: str, delta: Delta) -> LowRank:
    """Return the delta as factors. Raises UnsupportedError for a change that has none narrower than the weight."""
    part = inner(delta)
    made = low_rank(part) if len(part.shape) == 2 else None
    if made is None or made.rank >= min(part.shape):
        raise UnsupportedError(f"{key}: {type(part).__name__.lower()} of shape {tuple(part.shape)} has no factors for "
                               "a slot", hint="--merge load or --merge disk folds it into the weight")
    return made


def in_onnx_order(low: LowRank) -> tuple[Tensor, Tensor]:
    """Return float32 A (in, r) and B (r, out) with dW^T = A B: core and scale folded into B in float64, cast once."""
    a, b = decoded(low.a), decoded(low.b).double()
    if low.core is not None:
        b = b @ decoded(low.core).double()
    return a.float().mT.contiguous(), (b * low.scale).float().mT.contiguous()


def full_matrix(delta: BaseFree) -> Tensor:
    """Return dW^T (in, out) float32."""
    return delta.dense().float().mT.contiguous()


def fed(key: str, delta: Delta, slot: Slot, store: str, *, bits: float, weight: Weight) -> Fed:
    """Return the arrays of one slot. Raises FormatError for a rank or shape that the slot does not take."""
    gain = {slot.gain: cast(gains(key, delta, weight), slot.gain_dtype)} if slot.gain else {}
    if isinstance(delta, NeedsBase) and not slot.gain:
        raise UnsupportedError(f"{key}: the slot of {slot.stem} has no input for the magnitude of {delta.kind}",
                               hint="--slots patches the original base for this adapter, --merge folds it")
    if slot.delta:
        return Fed({slot.delta: cast(full_matrix(inner(delta)), slot.dtype), **gain}, 0.0)
    low = factors(key, delta)
    a, b = in_onnx_order(low)
    if slot.core:
        try:
            coded = encode(store, b.double().mT, a.double().mT, bits)
        except AdaptcError as e:
            raise type(e)(f"{key}: {e}", hint=e.hint) from e
        widths = (coded[0].shape[0 if CODES[store].dequantized else 1], coded[1].shape[1])
        if slot.nbytes not in ((0, 0), widths):
            raise FormatError(f"{key}: adapter is for shape {low.shape}, rows of {widths} bytes; input {slot.a} takes "
                              f"{slot.nbytes}", hint="the model is not the base the adapter was made for")
        back_b, back_a = decode(store, *coded, (b.shape[1], a.shape[0]))
        error = relative_error(low, LowRank(back_a, back_b, None, 1.0, low.shape))
        return Fed({slot.a: coded[0], slot.b: coded[1], slot.core: coded[2], **gain}, error)
    if (b.shape[1], a.shape[0]) != slot.shape and 0 not in slot.shape:
        raise FormatError(f"{key}: adapter is for shape {(b.shape[1], a.shape[0])}, input {slot.a} for {slot.shape}",
                          hint="the model is not the base the adapter was made for")
    a, b = _padded(key, slot, a, b)
    arrays = {slot.a: cast(a, slot.dtype), slot.b: cast(b, slot.dtype)}
    error = 0.0
    if slot.dtype == FLOAT16:
        half_a, half_b = a.half().mT, b.half().mT
        if not bool(torch.isfinite(half_b).all() and torch.isfinite(half_a).all()):
            raise FormatError(f"{key}: values beyond float16's 65504", hint="--store float32")
        error = relative_error(low, LowRank(half_a, half_b, None, 1.0, low.shape))
    return Fed(arrays | gain, error)


def nothing(slot: Slot, store: str) -> dict[str, Array]:
    """Return what a required slot is fed where the adapter changes nothing: rank 0, gains of one."""
    out, into = slot.shape
    arrays: dict[str, Array] = {}
    if slot.delta:
        arrays[slot.delta] = np.zeros((0, out), _numpy(slot.dtype))
    elif slot.core:
        code, first = CODES[store], (0, slot.nbytes[0])
        arrays = {slot.a: np.zeros(first[::-1] if code.dequantized else first, code.dtype),
                  slot.b: np.zeros((0, slot.nbytes[1]), code.dtype), slot.core: np.zeros((0, 0), np.float16)}
    else:
        rank = slot.rank or 0
        arrays = {slot.a: np.zeros((into, rank), _numpy(slot.dtype)), slot.b: np.zeros((rank, out), _numpy(slot.dtype))}
    if slot.gain:
        arrays[slot.gain] = np.ones(out, _numpy(slot.gain_dtype))
    return arrays


def gains(key: str, delta: Delta, weight: Weight) -> Tensor:
    """Return the gains of a module (out,): m / ||W0 + dW|| by rows for DoRA, ones for a delta without magnitude.

    ||W0 + s B A||^2 = ||W0||^2 + 2 s (W0 A^T) o B + s^2 (B A A^T) o B by rows, float64, without forming the sum.
    """
    if not isinstance(delta, NeedsBase):
        return torch.ones(delta.shape[0])
    low = factors(key, delta)
    b, a = low.factors()
    w0 = weight(key).double()
    if tuple(w0.shape) != (b.shape[0], a.shape[1]):
        raise FormatError(f"{key}: base weight has shape {tuple(w0.shape)}, the adapter was made for {low.shape}")
    squares = w0.square().sum(1) + 2 * ((w0 @ a.mT) * b).sum(1) + ((b @ (a @ a.mT)) * b).sum(1)
    return (delta.tensors["magnitude"].double().flatten() / squares.sqrt()).float()


def carried(adapter: Adapter) -> Mapping[str, Tensor]:
    """Return the tensors that replace parameters whole. Raises UnsupportedError for replaced rows of a parameter."""
    out: dict[str, Tensor] = {}
    for key, value in adapter.replaced.items():
        if isinstance(value, Rows):
            raise UnsupportedError(f"{key}: the adapter replaces {len(value.indices)} rows of it, which no slot holds")
        out[key] = value
    return out


def cast(t: Tensor, dtype: int) -> Array:
    """Return a tensor as an array of ONNX's dtype."""
    array: Array = t.float().numpy().astype(_numpy(dtype))
    return np.ascontiguousarray(array)


def _numpy(dtype: int) -> type:
    found: type = onnx_module().helper.tensor_dtype_to_np_dtype(dtype)
    return found


def _padded(key: str, slot: Slot, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors at the rank the graph was exported with, filled up with zeros."""
    if slot.rank is None or slot.rank == a.shape[1]:
        return a, b
    if a.shape[1] > slot.rank:
        raise FormatError(f"{key}: rank {a.shape[1]}, input {slot.a} takes {slot.rank}",
                          hint=f"adaptc compress --rank {slot.rank} makes it fit")
    missing = slot.rank - a.shape[1]
    return torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, 0, 0, missing))


def fp32_nbytes(adapter: Adapter) -> int:
    """Return the bytes of the adapter's factors in float32, what every code is measured against."""
    total = 0
    for delta in adapter.deltas.values():
        part = inner(delta)
        low = low_rank(part)
        total += 4 * (low.rank * sum(part.shape) if low is not None else math.prod(part.shape))
    return total
