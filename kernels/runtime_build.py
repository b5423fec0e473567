"""Turn one delta of an adapter into the branches that run it beside a layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, Dense, Kron, NeedsBase, Sparse, Sum, kind
from adaptc.errors import AdaptcError, FormatError, UnsupportedError
from adaptc.factor import Encoded, decoded
from adaptc.kernels import dora, sparse
from adaptc.kernels.device import FLOATS
from adaptc.kernels.runtime_branch import Beside, Branch, Constant, EmbeddingLow, Full, Low, Product, conv_low
from adaptc.kernels.runtime_codes import residents
from adaptc.kernels.runtime_match import Site, check_shape
from adaptc.kernels.walsh.branch import SpectralBeside
from adaptc.kernels.weight import plain_weight
from adaptc.lowrank import low_rank
from adaptc.resolve import SHAPE_ONLY, bound
from adaptc.spectral import Spectral

Built = tuple[tuple[Branch, ...], "Tensor | None"]  # branches, and DoRA's gain for each output


def build(adapter: Adapter, key: str, delta: Delta, site: Site) -> Built:
    """Return the branches of a delta, on the device of its layer.

    Raises FormatError for a shape that is not the layer's, UnsupportedError for what cannot run beside it, both naming
    the parameter.
    """
    try:
        if key.endswith(".bias"):
            return _bias(delta, site), None
        check_shape(key, delta.shape, site.shape)
        gain = None
        if isinstance(delta, NeedsBase):
            delta, gain = _needs_base(adapter, delta, site)
        branches = tuple(b for term in _terms(delta) for b in _branches(term, site))
        device = _device(site)
        for branch in branches:
            branch.move(device)
        return branches, None if gain is None else gain.to(device)
    except AdaptcError as e:
        raise type(e)(str(e) if key in str(e) else f"{key}: {e}", hint=e.hint) from e


def _needs_base(adapter: Adapter, delta: NeedsBase, site: Site) -> tuple[Delta, Tensor | None]:
    """Return the part that runs as an ordinary delta, and the gain of a DoRA layer."""
    if delta.kind in SHAPE_ONLY:
        return bound(adapter, delta).resolve(torch.empty(site.shape, device="meta")), None
    if delta.kind != "dora":
        raise UnsupportedError(f"{delta.kind} changes the base weight itself and does not run beside it",
                               hint="adaptc compress with the pass resolve and --base turns it into a delta that does")
    if delta.inner is None:
        raise FormatError("dora has no direction")
    if site.kind in ("embedding", "convolution", "bnb8") or int(delta.config.get("axis", 0)):
        raise UnsupportedError("dora runs beside linear layers, with the norm over inputs")
    weight = site.weight()
    if weight is None and site.float_weight is not None:
        weight = plain_weight(site.float_weight)
    parts = [b for term in _terms(delta.inner) for b in _branches(term, site)]
    if weight is None or len(parts) != 1 or not isinstance(parts[0], Low) or len(parts[0].parts) > 1:
        raise UnsupportedError("dora runs with one low-rank direction up to rank 256 and a base that can be read")
    low = parts[0]
    low.move(weight.data.device)
    if low.parts:
        norms = dora.row_norms(weight, low.parts[0], low.scale)
    else:
        norms = dora.naive.row_squares(weight).sqrt()
    magnitude = delta.tensors["magnitude"].reshape(-1).float().to(norms.device)
    if magnitude.numel() != norms.numel():
        raise FormatError(f"magnitude has {magnitude.numel()} entries for {norms.numel()} outputs")
    return delta.inner, magnitude / norms


def _terms(delta: Delta) -> tuple[Delta, ...]:
    return tuple(t for term in delta.terms for t in _terms(term)) if isinstance(delta, Sum) else (delta,)


def _branches(delta: Delta, site: Site) -> tuple[Branch, ...]:
    """Return the branches of one delta that is no sum."""
    linear = site.kind in ("linear", "conv1d", "packed", "bnb4", "bnb8")
    dtype = site.dtype or torch.float32
    if isinstance(delta, Kron) and linear:
        return (Product(delta),)
    if isinstance(delta, Sparse) and linear:
        m, n = site.shape
        return (Beside(sparse.by_rows(delta.places(), _floats(delta.values), (m, n)), delta.scale),)
    if isinstance(delta, Spectral) and linear:
        held = sparse.by_rows(delta.places(), _floats(delta.values), (site.shape[0], site.shape[1]))
        return (SpectralBeside(held, delta.basis(), delta.scale),)
    if isinstance(delta, Dense) and linear:
        if isinstance(delta.weight, Encoded):
            raise UnsupportedError(f"a delta in code {delta.weight.codec} has no factors and does not run without "
                                   "being decoded to a whole matrix", hint="adaptc compress it to low rank first")
        return (Full(_floats(delta.weight).reshape(site.shape), delta.scale),)
    low = None if isinstance(delta, Dense | Sparse | NeedsBase) else low_rank(delta)
    if low is None or low.a.shape[:-2] or low.b.shape[:-2]:
        raise UnsupportedError(f"a {kind(delta)} delta does not run beside a layer of kind {site.kind}")
    if site.kind == "convolution":
        b, a = replace(low, scale=1.0).factors()
        return (conv_low(site.module, a.to(dtype), b.to(dtype), low.scale),)
    parts, scale = residents(low, torch.float32 if site.dtype is None else dtype)
    return (EmbeddingLow(Low(parts, scale)) if site.kind == "embedding" else Low(parts, scale),)


def _bias(delta: Delta, site: Site) -> tuple[Branch, ...]:
    if not isinstance(delta, Dense) or delta.shape != (site.shape[0],):
        raise UnsupportedError(f"a bias takes a dense delta of shape ({site.shape[0]},), not {delta!r}")
    return (Constant(_floats(decoded(delta.weight)).reshape(-1).to(_device(site)), delta.scale),)


def _floats(t: Tensor) -> Tensor:
    return t if t.dtype in FLOATS else t.float()


def _device(site: Site) -> torch.device:
    data = site.module.data if site.kind == "packed" else site.module.weight
    device: torch.device = data.device
    return device
