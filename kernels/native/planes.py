"""LLVM IR of the 1-bit adapter: a mask register says which of 16 lanes a value is added to.

A sum of +-v is 2 (sum over the set bits) - (sum of all), so a plane costs one masked add for 16 signs.
"""

from __future__ import annotations

from adaptc.kernels.native.expand import MASKED, TABLES, tabled

F = "<16 x float>"
LANES = 4  # independent accumulators, to hide the latency of an add


def _masked(i: int, word: str, value: str) -> str:
    """Return acc.i + (value where the bits of a word are set), as %n{i}."""
    return f"""
  %w{i} = load i16, ptr {word}, align 2
  %k{i} = bitcast i16 %w{i} to <16 x i1>
  %v{i} = load float, ptr {value}, align 4
  %s{i}.1 = insertelement {F} poison, float %v{i}, i32 0
  %s{i} = shufflevector {F} %s{i}.1, {F} poison, <16 x i32> zeroinitializer
  %a{i} = fadd {F} %t{i}, %s{i}
  %n{i} = select <16 x i1> %k{i}, {F} %a{i}, {F} %t{i}"""


def _loop(word: str, value: str, count: str) -> str:
    """Return a function body: %total = sum over i < count of value[i] where word[i]'s bits are set, four at a time.

    The last count mod 4 go one by one into the first accumulator.
    """
    quad_phi = "".join(f"\n  %t{i} = phi {F} [ zeroinitializer, %entry ], [ %n{i}, %quad ]" for i in range(LANES))
    quad = "".join(
        f"""
  %i{i} = add i64 %i, {i}
  %pw{i} = getelementptr i16, ptr {word}, i64 %i{i}
  %pv{i} = getelementptr float, ptr {value}, i64 %i{i}"""
        + _masked(i, f"%pw{i}", f"%pv{i}")
        for i in range(LANES)
    )
    mid = "".join(f"\n  %m{i} = phi {F} [ zeroinitializer, %entry ], [ %n{i}, %quad ]" for i in range(LANES))
    return f"""
entry:
  %whole = and i64 {count}, -4
  %any = icmp sgt i64 %whole, 0
  br i1 %any, label %quad, label %rest
quad:
  %i = phi i64 [ 0, %entry ], [ %i.next, %quad ]{quad_phi}{quad}
  %i.next = add i64 %i, 4
  %more = icmp slt i64 %i.next, %whole
  br i1 %more, label %quad, label %rest
rest:{mid}
  %left = icmp slt i64 %whole, {count}
  br i1 %left, label %one, label %done
one:
  %j = phi i64 [ %whole, %rest ], [ %j.next, %one ]
  %t9 = phi {F} [ %m0, %rest ], [ %n9, %one ]
  %pw9 = getelementptr i16, ptr {word}, i64 %j
  %pv9 = getelementptr float, ptr {value}, i64 %j{_masked(9, "%pw9", "%pv9")}
  %j.next = add i64 %j, 1
  %again = icmp slt i64 %j.next, {count}
  br i1 %again, label %one, label %done
done:
  %z0 = phi {F} [ %m0, %rest ], [ %n9, %one ]
  %f0 = fadd {F} %z0, %m1
  %f1 = fadd {F} %m2, %m3
  %total = fadd {F} %f0, %f1
  ret {F} %total
}}
"""


SELECTED = f"""
define internal {F} @selected(ptr noalias %words, ptr noalias %values, i64 %count) alwaysinline {{
{_loop("%words", "%values", "%count")}"""

SIGNED = f"""
define internal {F} @signed(ptr noalias %words, ptr noalias %values, i64 %count, float %all) alwaysinline {{
  %s = call {F} @selected(ptr %words, ptr %values, i64 %count)
  %d = fadd {F} %s, %s
  %a.1 = insertelement {F} poison, float %all, i32 0
  %a = shufflevector {F} %a.1, {F} poison, <16 x i32> zeroinitializer
  %r = fsub {F} %d, %a
  ret {F} %r
}}
"""

SHRINK = f"""
define internal float @total(ptr noalias %x, i64 %n) {{
entry:
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %loop, label %exit
loop:
  %i = phi i64 [ 0, %entry ], [ %i.next, %loop ]
  %t = phi float [ 0.0, %entry ], [ %t.next, %loop ]
  %p = getelementptr float, ptr %x, i64 %i
  %v = load float, ptr %p, align 4
  %t.next = fadd reassoc float %t, %v
  %i.next = add i64 %i, 1
  %more = icmp slt i64 %i.next, %n
  br i1 %more, label %loop, label %exit
exit:
  %r = phi float [ 0.0, %entry ], [ %t.next, %loop ]
  ret float %r
}}

define internal void @inner(ptr noalias %h, ptr noalias %core, ptr noalias %g, float %scale, i64 %tq, i64 %tp) {{
entry:
  %s.1 = insertelement {F} poison, float %scale, i32 0
  %s = shufflevector {F} %s.1, {F} poison, <16 x i32> zeroinitializer
  br label %column
column:
  %c = phi i64 [ 0, %entry ], [ %c.next, %store ]
  br label %row
row:
  %r = phi i64 [ 0, %column ], [ %r.next, %row ]
  %t = phi {F} [ zeroinitializer, %column ], [ %t.next, %row ]
  %ph = getelementptr float, ptr %h, i64 %r
  %hv = load float, ptr %ph, align 4
  %hs.1 = insertelement {F} poison, float %hv, i32 0
  %hs = shufflevector {F} %hs.1, {F} poison, <16 x i32> zeroinitializer
  %at = mul i64 %r, %tp
  %to = add i64 %at, %c
  %pc = getelementptr float, ptr %core, i64 %to
  %cv = load {F}, ptr %pc, align 4
  %t.next = call {F} @llvm.fma.v16f32({F} %hs, {F} %cv, {F} %t)
  %r.next = add i64 %r, 1
  %more = icmp slt i64 %r.next, %tq
  br i1 %more, label %row, label %store
store:
  %gv = fmul {F} %t.next, %s
  %pg = getelementptr float, ptr %g, i64 %c
  store {F} %gv, ptr %pg, align 4
  %c.next = add i64 %c, 16
  %again = icmp slt i64 %c.next, %tp
  br i1 %again, label %column, label %exit
exit:
  ret void
}}

define internal void @shrink(ptr noalias %x, ptr noalias %q, ptr noalias %core, ptr noalias %g, float %scale, i64 %n,
                             i64 %tq, i64 %tp) {{
entry:
  %h = alloca [256 x float], align 64
  %all = call float @total(ptr %x, i64 %n)
  br label %word
word:
  %w = phi i64 [ 0, %entry ], [ %w.next, %word ]
  %q.row = lshr i64 %w, 4
  %q.at = mul i64 %q.row, %n
  %pq = getelementptr i16, ptr %q, i64 %q.at
  %v = call {F} @signed(ptr %pq, ptr %x, i64 %n, float %all)
  %ph = getelementptr float, ptr %h, i64 %w
  store {F} %v, ptr %ph, align 4
  %w.next = add i64 %w, 16
  %more = icmp slt i64 %w.next, %tq
  br i1 %more, label %word, label %done
done:
  call void @inner(ptr %h, ptr %core, ptr %g, float %scale, i64 %tq, i64 %tp)
  %gsum = call float @total(ptr %g, i64 %tp)
  %ps = getelementptr float, ptr %g, i64 %tp
  store float %gsum, ptr %ps, align 4
  ret void
}}
"""

ADAPTER = """
define internal void @adapter(ptr noalias %x, ptr noalias %q, ptr noalias %core, ptr noalias %p, ptr noalias %y,
                     float %scale, i64 %rows, i64 %ldx, i64 %n, i64 %tq, i64 %tp, i64 %ldy, i64 %groups) {
entry:
  %g = alloca [257 x float], align 64
  %some = icmp sgt i64 %rows, 0
  br i1 %some, label %row, label %exit
row:
  %m = phi i64 [ 0, %entry ], [ %m.next, %row ]
  %x.at = mul i64 %m, %ldx
  %px = getelementptr float, ptr %x, i64 %x.at
  %y.at = mul i64 %m, %ldy
  %py = getelementptr float, ptr %y, i64 %y.at
  call void @shrink(ptr %px, ptr %q, ptr %core, ptr %g, float %scale, i64 %n, i64 %tq, i64 %tp)
  call void @expand(ptr %g, ptr %p, ptr %py, i64 %tp, i64 %groups)
  %m.next = add i64 %m, 1
  %more = icmp slt i64 %m.next, %rows
  br i1 %more, label %row, label %exit
exit:
  ret void
}
"""

# What never changes for an adapter, in one block of seven words: a call from Python pays for every argument.
READY = """
define void @ready(ptr noalias %fixed, ptr noalias %x, ptr noalias %y, float %scale, i64 %rows, i64 %ldx, i64 %ldy) {
entry:
""" + "".join(
    f"""
  %a{i} = getelementptr i64, ptr %fixed, i64 {i}
  %{name} = load {kind}, ptr %a{i}"""
    for i, (name, kind) in enumerate(
        (("q", "ptr"), ("core", "ptr"), ("p", "ptr"), ("n", "i64"), ("tq", "i64"), ("tp", "i64"), ("groups", "i64"))
    )
) + """
  call void @adapter(ptr %x, ptr %q, ptr %core, ptr %p, ptr %y, float %scale, i64 %rows, i64 %ldx, i64 %n, i64 %tq,
                     i64 %tp, i64 %ldy, i64 %groups)
  ret void
}
"""


def text(target: str) -> str:
    """Return the functions for a target: outputs by tables where it looks up 16 floats at once, by masks elsewhere."""
    return SELECTED + SIGNED + SHRINK + (TABLES if tabled(target) else MASKED) + ADAPTER + READY
