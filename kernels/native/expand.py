"""LLVM IR of the output side of a 1-bit adapter, y += P g: by tables of signed sums, or by masks like the input."""

from __future__ import annotations

F = "<16 x float>"

_SIGN = [[1.0 if code >> bit & 1 else -1.0 for code in range(16)] for bit in range(4)]
_FOUR = "".join(
    f"""
  %i{bit} = add i64 %r, {bit}
  %pg{bit} = getelementptr float, ptr %g, i64 %i{bit}
  %g{bit} = load float, ptr %pg{bit}, align 4
  %v{bit}.1 = insertelement {F} poison, float %g{bit}, i32 0
  %v{bit} = shufflevector {F} %v{bit}.1, {F} poison, <16 x i32> zeroinitializer
  %t{bit} = call {F} @llvm.fma.v16f32({F} %v{bit}, {F} <{", ".join(f"float {v}" for v in _SIGN[bit])}>,
                                      {F} {f"%t{bit - 1}" if bit else "zeroinitializer"})"""
    for bit in range(4)
)
_EIGHT = "".join(
    f"""
  %o{half} = add i64 %r, {8 * half}
  %b{half} = shl i64 %o{half}, 1
  %pc{half} = getelementptr i8, ptr %pp, i64 %b{half}
  %c{half} = load <16 x i8>, ptr %pc{half}, align 1
  %y{half} = zext <16 x i8> %c{half} to <16 x i32>
  %x{half} = lshr <16 x i32> %y{half}, splat (i32 4)
  %at{half} = shl i64 %o{half}, 2
  %pt{half} = getelementptr float, ptr %tables, i64 %at{half}
  %ta{half} = load {F}, ptr %pt{half}, align 64
  %pu{half} = getelementptr float, ptr %pt{half}, i64 16
  %tb{half} = load {F}, ptr %pu{half}, align 64
  %la{half} = call {F} @llvm.x86.avx512.permvar.sf.512({F} %ta{half}, <16 x i32> %y{half})
  %lb{half} = call {F} @llvm.x86.avx512.permvar.sf.512({F} %tb{half}, <16 x i32> %x{half})
  %s{half} = fadd {F} %la{half}, %lb{half}"""
    for half in range(2)
)
# Four ranks at a time: their 16 signed sums stand in one register, and four signs of each output choose among them.
# The outputs of all groups share the tables, so 16 signs cost a quarter of a lookup and an add.
TABLES = f"""
define internal void @tabulate(ptr noalias %g, ptr noalias %tables, i64 %tp) {{
entry:
  br label %four
four:
  %r = phi i64 [ 0, %entry ], [ %r.next, %four ]{_FOUR}
  %to = shl i64 %r, 2
  %pt = getelementptr float, ptr %tables, i64 %to
  store {F} %t3, ptr %pt, align 64
  %r.next = add i64 %r, 4
  %more = icmp slt i64 %r.next, %tp
  br i1 %more, label %four, label %exit
exit:
  ret void
}}

define internal void @expand(ptr noalias %g, ptr noalias %p, ptr noalias %y, i64 %tp, i64 %groups) {{
entry:
  %tables = alloca [1024 x float], align 64
  call void @tabulate(ptr %g, ptr %tables, i64 %tp)
  %some = icmp sgt i64 %groups, 0
  br i1 %some, label %group, label %exit
group:
  %j = phi i64 [ 0, %entry ], [ %j.next, %done ]
  %word = mul i64 %j, %tp
  %p.at = shl i64 %word, 1
  %pp = getelementptr i8, ptr %p, i64 %p.at
  %col = shl i64 %j, 4
  %py = getelementptr float, ptr %y, i64 %col
  %old = load {F}, ptr %py, align 4
  br label %eight
eight:
  %r = phi i64 [ 0, %group ], [ %r.next, %eight ]
  %acc = phi {F} [ %old, %group ], [ %acc.next, %eight ]{_EIGHT}
  %both = fadd {F} %s0, %s1
  %acc.next = fadd {F} %acc, %both
  %r.next = add i64 %r, 16
  %more = icmp slt i64 %r.next, %tp
  br i1 %more, label %eight, label %done
done:
  store {F} %acc.next, ptr %py, align 4
  %j.next = add i64 %j, 1
  %again = icmp slt i64 %j.next, %groups
  br i1 %again, label %group, label %exit
exit:
  ret void
}}
"""

MASKED = f"""
define internal void @expand(ptr noalias %g, ptr noalias %p, ptr noalias %y, i64 %tp, i64 %groups) {{
entry:
  %ps = getelementptr float, ptr %g, i64 %tp
  %all = load float, ptr %ps, align 4
  %some = icmp sgt i64 %groups, 0
  br i1 %some, label %group, label %exit
group:
  %j = phi i64 [ 0, %entry ], [ %j.next, %group ]
  %p.at = mul i64 %j, %tp
  %pp = getelementptr i16, ptr %p, i64 %p.at
  %col = shl i64 %j, 4
  %v = call {F} @signed(ptr %pp, ptr %g, i64 %tp, float %all)
  %py = getelementptr float, ptr %y, i64 %col
  %old = load {F}, ptr %py, align 4
  %new = fadd {F} %old, %v
  store {F} %new, ptr %py, align 4
  %j.next = add i64 %j, 1
  %again = icmp slt i64 %j.next, %groups
  br i1 %again, label %group, label %exit
exit:
  ret void
}}
"""


def tabled(target: str) -> bool:
    """Return whether the output signs of a target are nibbles of four ranks each, not words of 16 outputs."""
    return target == "avx512"
