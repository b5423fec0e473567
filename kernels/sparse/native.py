"""Entries of a weight overwritten by a compiled loop that asks for their cache lines ahead.

At 1 % of the entries of a large matrix nearly every one lies in a cache line of its own, so the time is that of memory
answering. torch's index_copy_ waits for each line; this loop has 24 of them on their way, and reads positions of four
bytes instead of eight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adaptc.kernels.device import backend

AHEAD = 24  # entries; 8 to 64 measured alike
_WORTH = 1 << 12  # entries that pay for the call
_PIECE = 1 << 16  # entries that pay for a thread

_TEXT = """
define void @put(ptr noalias %w, ptr noalias %index, ptr noalias %values, i64 %k) {{
entry:
  %some = icmp sgt i64 %k, 0
  %last = sub i64 %k, 1
  br i1 %some, label %loop, label %exit
loop:
  %t = phi i64 [ 0, %entry ], [ %t.next, %loop ]
  %far = add i64 %t, {ahead}
  %soon = call i64 @llvm.umin.i64(i64 %far, i64 %last)
  %soon.index = getelementptr i32, ptr %index, i64 %soon
  %soon.at = load i32, ptr %soon.index, align 4
  %soon.wide = zext i32 %soon.at to i64
  %soon.entry = getelementptr {type}, ptr %w, i64 %soon.wide
  call void @llvm.prefetch.p0(ptr %soon.entry, i32 1, i32 3, i32 1)
  %now.index = getelementptr i32, ptr %index, i64 %t
  %now.at = load i32, ptr %now.index, align 4
  %now.wide = zext i32 %now.at to i64
  %now.entry = getelementptr {type}, ptr %w, i64 %now.wide
  %now.value = getelementptr {type}, ptr %values, i64 %t
  %value = load {type}, ptr %now.value, align {nbytes}
  store {type} %value, ptr %now.entry, align {nbytes}
  %t.next = add i64 %t, 1
  %more = icmp slt i64 %t.next, %k
  br i1 %more, label %loop, label %exit
exit:
  ret void
}}
declare i64 @llvm.umin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def packed(flat: Tensor, index: Tensor) -> Tensor:
    """Return int64 positions as `put` takes them for this weight: int32 where the compiled loop runs."""
    fits = flat.element_size() in (2, 4) and flat.numel() <= 2**31 and index.numel() >= _WORTH
    if fits and flat.device.type == "cpu" and backend(flat) == "native" and _available():
        return index.int()
    return index


def put(flat: Tensor, index: Tensor, values: Tensor) -> None:
    """flat[index] = values in place: unique positions within the weight, as `packed` returned them, of its dtype.

    Positions of four bytes are not checked again; whoever packs them has read the weight at them.
    """
    if index.dtype != torch.int32:
        flat.index_copy_(0, index, values)
        return
    k, loop = index.numel(), _compiled(flat.element_size())
    w, i, v, size = flat.data_ptr(), index.data_ptr(), values.data_ptr(), flat.element_size()
    threads = min(torch.get_num_threads(), -(-k // _PIECE))
    if threads < 2:
        loop(w, i, v, k)
        return
    cuts = [k * t // threads for t in range(threads + 1)]
    work = [(w, i + 4 * a, v + size * a, b - a) for a, b in pairwise(cuts)]
    rest = [_pool().submit(loop, *piece) for piece in work[1:]]  # compiled code runs without Python's lock
    loop(*work[0])
    for piece in rest:
        piece.result()


@cache
def _available() -> bool:
    try:
        import llvmlite.binding
    except ImportError:
        return False
    return bool(llvmlite.binding.llvm_version_info[0] >= 15)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())


@cache
def _compiled(nbytes: int) -> Callable[[int, int, int, int], None]:
    address = _engine(nbytes).get_function_address("put")
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(address)


@cache
def _engine(nbytes: int) -> Any:
    """Return what keeps the compiled loop for entries of `nbytes` bytes in memory."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_TEXT.format(type=f"i{8 * nbytes}", nbytes=nbytes, ahead=AHEAD))
    module.verify()
    engine: Any = llvm.create_mcjit_compiler(module, llvm.Target.from_default_triple().create_target_machine(opt=3))
    engine.finalize_object()
    return engine
