"""Tensors of a model exchanged while an adapter is active: whole parameters, some of their rows, sparse entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapter import Replacement, Rows
from adaptc.delta import Sparse
from adaptc.errors import FormatError
from adaptc.kernels import sparse
from adaptc.kernels.runtime_match import Site

Undo = Callable[[], None]


def tensor_of(model: nn.Module, key: str) -> Tensor:
    """Return the parameter or buffer `key`."""
    owner, _, leaf = key.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), leaf)
    return found


def check_replacement(key: str, value: Replacement, have: Tensor) -> None:
    """Raise FormatError where a replacement does not fit the tensor."""
    if isinstance(value, Rows):
        last, width = max(value.indices, default=-1), tuple(value.values.shape[1:])
        if last >= have.shape[0] or width != have.shape[1:] or not have.is_floating_point():
            raise FormatError(f"{key}: rows to {last} of shape {width} do not fit a tensor of {tuple(have.shape)}")
    elif value.shape != have.shape:
        raise FormatError(f"{key}: adapter replaces it by {tuple(value.shape)}, the model has {tuple(have.shape)}")


def put(model: nn.Module, key: str, value: Replacement) -> Undo:
    """Put a replacement in place; the returned call puts back what stood there, the same object bit for bit."""
    owner, _, leaf = key.rpartition(".")
    module, old = model.get_submodule(owner), tensor_of(model, key)
    if isinstance(value, Rows):  # in place, so that a tied head sees them too
        at = torch.tensor(value.indices, device=old.device)
        data = old.detach()
        saved = data[at].clone()
        data[at] = value.values.to(old)

        def back() -> None:
            data[at] = saved

        return back
    store: dict[str, Any] = module.__dict__["_parameters" if leaf in module._parameters else "_buffers"]
    new = value.to(old)
    store[leaf] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new

    def restore() -> None:
        store[leaf] = old

    return restore


def switch(site: Site, delta: Sparse, scale: float) -> Undo:
    """Add a sparse delta to the weight in place; the returned call writes back what stood there."""
    w: Tensor = site.module.weight.detach()
    index = delta.places().to(w.device)
    if site.kind == "conv1d":  # stored (in, out)
        out, n = site.shape
        index = index % n * out + index // n
    flat = w.view(w.shape[0], -1)
    saved = sparse.shift(flat, index, delta.values.to(w.device), delta.scale * scale)

    def back() -> None:
        sparse.overwrite(flat, index, saved)

    return back
