"""The loop of `tans` over fine lanes as LLVM IR: 32 lanes in two vectors, and a thread for each processor.

Both vectors gather table entries and windows of the stream and shift; nothing branches on the data. Four points make
one 32-bit word of a lane. Every gathered index is clipped, so no payload makes it read outside its buffers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Starts = tuple[Ints, Ints, Ints, Ints, Ints]  # of each lane: first bit, both table origins, split, length

GROUP = 32  # lanes a step decodes
_PIECE = 16 * GROUP  # lanes a thread takes at a time
_WORTH = 1 << 21  # samples that pay for compiling
_LONGEST = 1 << 25  # samples of a lane: 32 of them span at most 2^30 bytes
_V = "<16 x i32>"
_HALVES = (0, 1)
_FIELDS = ("at", "first", "second", "split", "length")


def _splat(name: str, value: str) -> str:
    return f"""
  %{name}.1 = insertelement {_V} poison, i32 {value}, i32 0
  %{name} = shufflevector {_V} %{name}.1, {_V} poison, <16 x i32> zeroinitializer"""


def _gather(name: str, source: str, width: int, index: str, largest: str) -> str:
    """Return %name = 32-bit words of `source` at `index` (in units of `width` bits), clipped to `largest`."""
    return f"""
  %{name}.in = call {_V} @llvm.umin.v16i32({_V} {index}, {_V} {largest})
  %{name}.at = getelementptr i{width}, ptr {source}, {_V} %{name}.in
  %{name} = call {_V} @llvm.masked.gather.v16i32.v16p0(<16 x ptr> %{name}.at, i32 1,
                                                       <16 x i1> splat (i1 true), {_V} poison)"""


def _window(name: str, position: str) -> str:
    """Return %name = the 32 bits of the stream at bit `position`, of which the low 15 may be missing."""
    return f"""
  %{name}.i = lshr {_V} {position}, splat (i32 4)
{_gather(f"{name}.le", "%data", 16, f"%{name}.i", "%last")}
  %{name}.be = call {_V} @llvm.bswap.v16i32({_V} %{name}.le)
  %{name}.skip = and {_V} {position}, splat (i32 15)
  %{name} = shl {_V} %{name}.be, %{name}.skip"""


def _step(h: int, k: int) -> str:
    """Return sample number %i + k of half h: state s, bit position p and packed points w go from k to k + 1."""
    t = f"{h}.{k}"
    return f"""
  %turn{t} = icmp eq {_V} %split{h}, %i{k}
  %low{t} = and {_V} %s{t}, splat (i32 1023)
  %moved{t} = add {_V} %low{t}, %second{h}
  %now{t} = select <16 x i1> %turn{t}, {_V} %moved{t}, {_V} %s{t}
{_gather(f"e{t}", "%table", 32, f"%now{t}", "%rows")}
{_window(f"win{t}", f"%p{t}")}
  %n7{t} = lshr {_V} %e{t}, splat (i32 7)
  %n15{t} = and {_V} %n7{t}, splat (i32 15)
  %goes{t} = icmp ugt {_V} %length{h}, %i{k + 1}
  %n{t} = select <16 x i1> %goes{t}, {_V} %n15{t}, {_V} zeroinitializer
  %p{h}.{k + 1} = add {_V} %p{t}, %n{t}
  %less{t} = sub {_V} splat (i32 31), %n{t}
  %one{t} = lshr {_V} %win{t}, splat (i32 1)
  %got{t} = lshr {_V} %one{t}, %less{t}
  %base{t} = lshr {_V} %e{t}, splat (i32 11)
  %s{h}.{k + 1} = add {_V} %base{t}, %got{t}
  %sym{t} = and {_V} %e{t}, splat (i32 127)
  %put{t} = shl {_V} %sym{t}, splat (i32 {8 * k})
  %w{h}.{k + 1} = or {_V} {f"%w{t}" if k else "zeroinitializer"}, %put{t}"""


def _text() -> str:
    """Return @decode: points of groups of 32 lanes, rows of `stride` bytes; `at` becomes the bit where each lane ends.

    at, first, second, split, length: uint32 (32 * groups,), the first lane of a group its longest; last, rows: largest
    index into data, in 16-bit units, and into table.
    """
    arguments = ", ".join(f"ptr noalias %{name}" for name in ("data", "table", *_FIELDS, "out"))
    lanes = ", ".join(f"i32 {i}" for i in range(16))
    load, begin, phi, ends = "", "", "", ""
    for h in _HALVES:
        load += f"\n  %j{h} = add i64 %j, {16 * h}"
        for name in _FIELDS:
            load += f"""
  %q{name}{h} = getelementptr i32, ptr %{name}, i64 %j{h}
  %{name}{h} = load {_V}, ptr %q{name}{h}, align 4"""
        begin += f"""
{_window(f"z.win{h}", f"%at{h}")}
  %z.x{h} = lshr {_V} %z.win{h}, splat (i32 22)
  %z.s{h} = add {_V} %z.x{h}, %first{h}
  %z.p{h} = add {_V} %at{h}, splat (i32 10)
  %z.row{h} = mul i64 %j{h}, %stride
  %z.out{h} = getelementptr i8, ptr %out, i64 %z.row{h}"""
        phi += f"""
  %s{h}.0 = phi {_V} [ %z.s{h}, %group ], [ %s{h}.4, %four ]
  %p{h}.0 = phi {_V} [ %z.p{h}, %group ], [ %p{h}.4, %four ]"""
        ends += f"\n  store {_V} %p{h}.4, ptr %qat{h}, align 4"
    work = "".join(_splat(f"i{k}", f"%t{k}") for k in range(5))
    work += "".join(_step(h, k) for k in range(4) for h in _HALVES)
    for h in _HALVES:
        work += f"""
  %by{h} = bitcast {_V} %w{h}.4 to <64 x i8>
  %pt{h} = sub <64 x i8> %by{h}, splat (i8 64)
  %v{h} = bitcast <64 x i8> %pt{h} to {_V}
  %to{h} = getelementptr i8, ptr %z.out{h}, i64 %i64
  %tos{h} = getelementptr i8, ptr %to{h}, {_V} %offset
  call void @llvm.masked.scatter.v16i32.v16p0({_V} %v{h}, <16 x ptr> %tos{h}, i32 4, <16 x i1> splat (i1 true))"""
    return f"""
define void @decode({arguments}, i32 %last.s, i32 %rows.s, i64 %stride, i64 %groups) {{
entry:{_splat("last", "%last.s")}{_splat("rows", "%rows.s")}
  %stride.s = trunc i64 %stride to i32{_splat("stride.v", "%stride.s")}
  %offset = mul {_V} %stride.v, <{lanes}>
  %some = icmp sgt i64 %groups, 0
  br i1 %some, label %group, label %exit
group:
  %g = phi i64 [ 0, %entry ], [ %g.next, %end ]
  %j = shl i64 %g, 5{load}{begin}
  %steps = load i32, ptr %qlength0, align 4
  br label %four
four:
  %t0 = phi i32 [ 0, %group ], [ %t4, %four ]{phi}
  %i64 = zext i32 %t0 to i64
  %t1 = add i32 %t0, 1
  %t2 = add i32 %t0, 2
  %t3 = add i32 %t0, 3
  %t4 = add i32 %t0, 4{work}
  %more = icmp ult i32 %t4, %steps
  br i1 %more, label %four, label %end
end:{ends}
  %g.next = add i64 %g, 1
  %again = icmp slt i64 %g.next, %groups
  br i1 %again, label %group, label %exit
exit:
  ret void
}}
declare {_V} @llvm.umin.v16i32({_V}, {_V})
declare {_V} @llvm.bswap.v16i32({_V})
declare {_V} @llvm.masked.gather.v16i32.v16p0(<16 x ptr>, i32, <16 x i1>, {_V})
declare void @llvm.masked.scatter.v16i32.v16p0({_V}, <16 x ptr>, i32, <16 x i1>)
"""


@cache
def _compiled() -> tuple[Callable[..., None], Any] | None:
    """Compile for this machine (once): the function, which releases Python's lock, and the engine that holds it.

    None without llvmlite, or where it is too old for this IR.
    """
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features().flatten()
        module = llvm.parse_assembly(f'target triple = "{triple}"\n' + _text())
        module.verify()
    except (ImportError, OSError, RuntimeError):
        return None
    if "+avx512f" in features:  # the default of LLVM halves the vectors
        features += ",-prefer-256-bit"
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    sizes = [ctypes.c_uint32] * 2 + [ctypes.c_int64] * 2
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 8, *sizes)(engine.get_function_address("decode"))
    return function, engine


def chosen(length: Ints) -> bool:
    """Return whether native code decodes lanes of these lengths: it compiles, and they are worth it or it is forced.

    ADAPTC_KERNELS forces it: naive never, native always; lanes of 2^25 samples would not fit its 32-bit offsets.
    """
    wish = os.environ.get("ADAPTC_KERNELS", "auto")
    if wish == "naive" or sys.byteorder != "little" or len(length) == 0 or int(length.max()) >= _LONGEST:
        return False
    return (wish == "native" or int(length.sum()) >= _WORTH) and _compiled() is not None


def decode_fine(
    data: npt.NDArray[np.uint8], table: npt.NDArray[np.uint32], lanes: Starts
) -> tuple[list[npt.NDArray[np.int8]], Ints]:
    """Decode lanes of fine classes from `data`, padded to an even length of at least 4: points and ends, in bits."""
    length, first = lanes[4], lanes[1]
    order = np.lexsort((first, -length))
    pieces = [order[i : i + _PIECE] for i in range(0, len(order), _PIECE)]
    ends, rows = np.zeros(len(length), np.int64), [np.empty(0, np.int8)] * len(length)

    def decode_piece(lane: Ints) -> None:
        points, stops = _decode_piece(data, table, [field[lane] for field in lanes])
        ends[lane] = stops
        for j, row, n in zip(lane.tolist(), points, length[lane].tolist(), strict=False):
            rows[j] = row[:n]

    threads = min(os.cpu_count() or 1, len(pieces))
    if threads < 2:
        for piece in pieces:
            decode_piece(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode_piece, pieces))
    return rows, ends


def _decode_piece(
    data: npt.NDArray[np.uint8], table: npt.NDArray[np.uint32], fields: list[Ints]
) -> tuple[npt.NDArray[np.int8], Ints]:
    """Decode lanes sorted by falling length, filled up to whole groups with lanes of no samples."""
    count = len(fields[0])
    groups = -(-count // GROUP)
    stride = -(-max(int(fields[4][0]), 1) // 4) * 4
    at, first, second, split, length = filled = np.zeros((5, groups * GROUP), np.uint32)
    for row, field in zip(filled, fields, strict=True):
        row[:count] = field
    points = np.empty((groups * GROUP, stride), np.int8)
    compiled = _compiled()
    assert compiled is not None  # `chosen` asked
    pointers = [a.ctypes.data for a in (data, table, at, first, second, split, length, points)]
    compiled[0](*pointers, len(data) // 2 - 2, len(table) - 1, stride, groups)
    return points, at[:count].astype(np.int64)
