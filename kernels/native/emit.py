"""LLVM IR of the native ops, as text: 16-lane vectors throughout, one target-specific lookup."""

from __future__ import annotations

import struct

F = "<16 x float>"


def _bits(value: float) -> str:
    """Return a float32 constant as LLVM writes it: the bits of the double it equals."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    (bits,) = struct.unpack("<Q", struct.pack("<d", rounded))
    return f"0x{bits:016X}"


def _vector(values: list[float]) -> str:
    return ", ".join(f"float {_bits(v)}" for v in values)


def lookup(table: tuple[float, ...], target: str) -> str:
    """Return `@lookup(<16 x i32>) -> <16 x float>` by the low four bits, for avx512, avx2, neon or generic."""
    head = f"define internal {F} @lookup(<16 x i32> %c) alwaysinline {{\n"
    values = list(table)
    if target == "avx512":
        body = f"""
  %v = call {F} @llvm.x86.avx512.permvar.sf.512({F} <{_vector(values)}>, <16 x i32> %c)
  ret {F} %v
}}
declare {F} @llvm.x86.avx512.permvar.sf.512({F}, <16 x i32>)
"""
    elif target == "avx2":
        low, high = _vector(values[:8]), _vector(values[8:])
        parts = []
        for half, first in (("a", 0), ("b", 8)):
            order = ", ".join(f"i32 {first + i}" for i in range(8))
            parts.append(f"""
  %i{half} = shufflevector <16 x i32> %c, <16 x i32> poison, <8 x i32> <{order}>
  %l{half} = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{low}>, <8 x i32> %i{half})
  %h{half} = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{high}>, <8 x i32> %i{half})
  %b{half} = and <8 x i32> %i{half}, splat (i32 8)
  %s{half} = icmp ne <8 x i32> %b{half}, zeroinitializer
  %v{half} = select <8 x i1> %s{half}, <8 x float> %h{half}, <8 x float> %l{half}""")
        join = ", ".join(f"i32 {i}" for i in range(16))
        body = (
            "".join(parts)
            + f"""
  %v = shufflevector <8 x float> %va, <8 x float> %vb, <16 x i32> <{join}>
  ret {F} %v
}}
declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)
"""
        )
    elif target == "neon":  # one table lookup for each byte of a float
        raw = [struct.pack("<f", v) for v in values]
        parts = []
        for byte in range(4):
            plane = ", ".join(f"i8 {r[byte] - 256 if r[byte] > 127 else r[byte]}" for r in raw)
            parts.append(
                f"\n  %b{byte} = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> <{plane}>, <16 x i8> %n)"
            )
        wide = ", ".join(f"i32 {i}" for i in range(32))
        weave = ", ".join(f"i32 {i + 16 * byte}" for i in range(16) for byte in range(4))
        narrow = "\n  %t = trunc <16 x i32> %c to <16 x i8>\n  %n = and <16 x i8> %t, splat (i8 15)"
        body = (
            narrow
            + "".join(parts)
            + f"""
  %p = shufflevector <16 x i8> %b0, <16 x i8> %b1, <32 x i32> <{wide}>
  %q = shufflevector <16 x i8> %b2, <16 x i8> %b3, <32 x i32> <{wide}>
  %w = shufflevector <32 x i8> %p, <32 x i8> %q, <64 x i32> <{weave}>
  %v = bitcast <64 x i8> %w to {F}
  ret {F} %v
}}
declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)
"""
        )
    else:
        loads = []
        for i in range(16):
            loads.append(f"""
  %c{i} = extractelement <16 x i32> %c, i32 {i}
  %n{i} = and i32 %c{i}, 15
  %i{i} = zext i32 %n{i} to i64
  %p{i} = getelementptr float, ptr @table, i64 %i{i}
  %f{i} = load float, ptr %p{i}
  %v{i} = insertelement {F} {f"%v{i - 1}" if i else "poison"}, float %f{i}, i32 {i}""")
        body = "".join(loads) + f"\n  ret {F} %v15\n}}\n@table = internal constant [16 x float] [{_vector(values)}]\n"
    return head + body


def _splat(name: str, value: str) -> str:
    return f"""
  %{name}.1 = insertelement {F} poison, float {value}, i32 0
  %{name} = shufflevector {F} %{name}.1, {F} poison, <16 x i32> zeroinitializer"""


def gemv(rows: int) -> str:
    """Return `@gemv{rows}`: y[m, n] = x[m] . dequant(w)[n] for `rows` rows of x and n in [lo, hi).

    even, odd: float32 (rows, half), the even and the odd columns of x; codes (N, 32 * blocks) bytes, even column in the
    high nibble; scales (N, blocks) float32; y rows are `ldy` floats apart.
    """
    each = range(rows)
    phis = "".join(f"\n  %t{m} = phi {F} [ zeroinitializer, %row ], [ %n{m}, %block ]" for m in each)
    work = ""
    for m in each:
        loads = "".join(
            f"""
  %p{tag}{m} = getelementptr float, ptr %{src}, i64 %at{m}.{k}
  %{tag}{m} = load {F}, ptr %p{tag}{m}, align 4"""
            for tag, src, k in (("e0", "even", 0), ("o0", "odd", 0), ("e1", "even", 1), ("o1", "odd", 1))
        )
        work += f"""
  %base{m} = mul i64 %half, {m}
  %at{m}.0 = add i64 %base{m}, %k
  %at{m}.1 = add i64 %at{m}.0, 16{loads}
  %ua{m} = fmul {F} %h0, %e0{m}
  %ub{m} = call {F} @llvm.fma.v16f32({F} %l0, {F} %o0{m}, {F} %ua{m})
  %uc{m} = call {F} @llvm.fma.v16f32({F} %h1, {F} %e1{m}, {F} %ub{m})
  %ud{m} = call {F} @llvm.fma.v16f32({F} %l1, {F} %o1{m}, {F} %uc{m})
  %n{m} = call {F} @llvm.fma.v16f32({F} %s, {F} %ud{m}, {F} %t{m})"""
    ends = "".join(
        f"""
  %sum{m} = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {F} %n{m})
  %off{m} = mul i64 %ldy, {m}
  %to{m} = add i64 %off{m}, %n
  %py{m} = getelementptr float, ptr %y, i64 %to{m}
  store float %sum{m}, ptr %py{m}"""
        for m in each
    )
    return f"""
define void @gemv{rows}(ptr noalias %even, ptr noalias %odd, ptr noalias %codes, ptr noalias %scales, ptr noalias %y,
                        i64 %blocks, i64 %half, i64 %ldy, i64 %lo, i64 %hi) {{
entry:
  %some = icmp slt i64 %lo, %hi
  br i1 %some, label %row, label %exit
row:
  %n = phi i64 [ %lo, %entry ], [ %n.next, %end ]
  %first = mul i64 %n, %blocks
  br label %block
block:
  %b = phi i64 [ 0, %row ], [ %b.next, %block ]{phis}
  %cell = add i64 %first, %b
  %byte = shl i64 %cell, 5
  %pc = getelementptr i8, ptr %codes, i64 %byte
  %c0 = load <16 x i8>, ptr %pc, align 1
  %pd = getelementptr i8, ptr %pc, i64 16
  %c1 = load <16 x i8>, ptr %pd, align 1
  %y0 = zext <16 x i8> %c0 to <16 x i32>
  %y1 = zext <16 x i8> %c1 to <16 x i32>
  %x0 = lshr <16 x i32> %y0, splat (i32 4)
  %x1 = lshr <16 x i32> %y1, splat (i32 4)
  %h0 = call {F} @lookup(<16 x i32> %x0)
  %h1 = call {F} @lookup(<16 x i32> %x1)
  %l0 = call {F} @lookup(<16 x i32> %y0)
  %l1 = call {F} @lookup(<16 x i32> %y1)
  %ps = getelementptr float, ptr %scales, i64 %cell
  %s0 = load float, ptr %ps{_splat("s", "%s0")}
  %k = shl i64 %b, 5{work}
  %b.next = add i64 %b, 1
  %more = icmp slt i64 %b.next, %blocks
  br i1 %more, label %block, label %end
end:{ends}
  %n.next = add i64 %n, 1
  %again = icmp slt i64 %n.next, %hi
  br i1 %again, label %row, label %exit
exit:
  ret void
}}
"""


DECLARE = f"""
declare {F} @llvm.fma.v16f32({F}, {F}, {F})
declare float @llvm.vector.reduce.fadd.v16f32(float, {F})
"""

_WEAVE = ", ".join(f"i32 {k // 2 + 16 * (k % 2)}" for k in range(32))  # even, odd, even, odd ...
DEQUANT = (
    f"""
define void @dequant(ptr noalias %codes, ptr noalias %scales, ptr noalias %out, i64 %cells) {{
entry:
  %some = icmp slt i64 0, %cells
  br i1 %some, label %block, label %exit
block:
  %cell = phi i64 [ 0, %entry ], [ %next, %block ]
  %byte = shl i64 %cell, 5
  %ps = getelementptr float, ptr %scales, i64 %cell
  %s0 = load float, ptr %ps{_splat("s", "%s0")}
  %base = shl i64 %cell, 6
"""
    + "".join(
        f"""
  %f{i} = add i64 %byte, {16 * i}
  %pc{i} = getelementptr i8, ptr %codes, i64 %f{i}
  %c{i} = load <16 x i8>, ptr %pc{i}, align 1
  %y{i} = zext <16 x i8> %c{i} to <16 x i32>
  %x{i} = lshr <16 x i32> %y{i}, splat (i32 4)
  %h{i} = call {F} @lookup(<16 x i32> %x{i})
  %l{i} = call {F} @lookup(<16 x i32> %y{i})
  %hs{i} = fmul {F} %h{i}, %s
  %ls{i} = fmul {F} %l{i}, %s
  %w{i} = shufflevector {F} %hs{i}, {F} %ls{i}, <32 x i32> <{_WEAVE}>
  %o{i} = add i64 %base, {32 * i}
  %po{i} = getelementptr float, ptr %out, i64 %o{i}
  store <32 x float> %w{i}, ptr %po{i}, align 4"""
        for i in range(2)
    )
    + """
  %next = add i64 %cell, 1
  %more = icmp slt i64 %next, %cells
  br i1 %more, label %block, label %exit
exit:
  ret void
}
"""
)
