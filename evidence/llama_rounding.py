"""What llama.cpp's CPU kernels do to activations before they meet a quantized tensor, done in torch.

Every product with a tensor of a type with blocks rounds the other side too: to 8 bits over 32 values with an fp16 scale
(Q8_0), or over 256 with a float32 scale (Q8_K); F16 and BF16 tensors round it to their own type. A reference without
that differs from llama.cpp by percents, one with it by the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adaptc.formats.gguf_types import TYPES

# ggml type id -> how the other side is rounded; ids that are missing here meet Q8_K.
_Q8_0 = frozenset({2, 3, 6, 7, 8, 20, 39, 41})


def rounded_q8_0(x: Tensor) -> Tensor:
    """Return x (..., n), n a multiple of 32, rounded as ggml's quantize_row_q8_0: q = round(x 127 / max), d in fp16."""
    blocks = x.float().reshape(*x.shape[:-1], -1, 32)
    top = blocks.abs().amax(-1, keepdim=True)
    q = torch.where(top > 0, (blocks * (127 / top.clamp(min=1e-38))).round(), torch.zeros_like(blocks))
    return ((top / 127).half().float() * q).flatten(-2)


def rounded_q8_k(x: Tensor) -> Tensor:
    """Return x (..., n), n a multiple of 256, rounded as ggml's quantize_row_q8_K: the extreme becomes -127 times d."""
    blocks = x.float().reshape(*x.shape[:-1], -1, 256)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extreme != 0, -127 / extreme, torch.zeros_like(extreme))
    q = (blocks * inverse).round().clamp(max=127)
    made: Tensor = torch.where(inverse != 0, q / inverse, torch.zeros_like(q))
    return made.flatten(-2)


def rounding(type_id: int) -> Callable[[Tensor], Tensor]:
    """Return what happens to the other side of a product with a tensor of this type."""
    plain = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
    if type_id in plain:
        dtype = plain[type_id]
        return lambda x: x.to(dtype).float()
    return rounded_q8_0 if type_id in _Q8_0 else rounded_q8_k


@contextmanager
def branches(model: Any, factors: Mapping[str, tuple[Tensor, Tensor, int, int]], scale: float = 1.0) -> Iterator[None]:
    """Run `model` with scale * B (A x) added to the modules named, each product rounded as llama.cpp does.

    factors: module -> (a (r, in), b (out, r), type ids of a and b), as llama.cpp decodes them.
    """
    hooks = []
    for name, (a, b, type_a, type_b) in factors.items():
        hooks.append(model.get_submodule(name).register_forward_hook(_branch(a, b, rounding(type_a), rounding(type_b),
                                                                              scale)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def rounded_inputs(model: Any, types: Mapping[str, int]) -> Iterator[None]:
    """Run `model` with the inputs of the modules named rounded as their tensors' types make llama.cpp do."""
    hooks = []
    for name, type_id in types.items():
        if type_id != TYPES["f32"].id:
            hooks.append(model.get_submodule(name).register_forward_pre_hook(_before(rounding(type_id))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before(how: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    return lambda _, given: (how(given[0]), *given[1:])


def _branch(a: Tensor, b: Tensor, for_a: Callable[[Tensor], Tensor], for_b: Callable[[Tensor], Tensor], scale: float
            ) -> Callable[[Any, Any, Tensor], Tensor]:
    def add(_: Any, given: Any, out: Tensor) -> Tensor:
        return out + scale * (for_b(for_a(given[0]) @ a.mT) @ b.mT)

    return add
