"""Compile the native ops in memory for this machine, or to assembly for another one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from adaptc.kernels.native import emit, planes
from adaptc.kernels.weight import INT4, NF4

ROWS = (1, 2, 3, 4)  # rows of x that share one decoding of the weight
TARGETS = {
    "avx512": ("x86_64-unknown-linux-gnu", "skylake-avx512", ""),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", ""),
    "neon": ("aarch64-unknown-linux-gnu", "cortex-a72", ""),
    "generic": ("x86_64-unknown-linux-gnu", "x86-64", ""),
}


@dataclass(frozen=True, eq=False)
class Native:
    """Compiled functions; they release Python's lock. `engine` keeps their memory."""

    target: str
    gemv: dict[tuple[str, int], Any]
    dequant: dict[str, Any]
    adapter: Any
    engines: tuple[Any, ...]


def module_text(code: str, target: str) -> str:
    """Return the IR of every function for one 4-bit code."""
    table = NF4 if code == "nf4" else INT4
    return "\n".join(
        (emit.lookup(table, target), *map(emit.gemv, ROWS), emit.DEQUANT, planes.text(target), emit.DECLARE)
    )


def host_target() -> str:
    """Return the widest target this machine runs."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if llvm.get_process_triple().startswith("aarch64"):
        return "neon"
    if features.get("avx512f") and features.get("avx512vl"):
        return "avx512"
    return "avx2" if features.get("avx2") and features.get("fma") else "generic"


def assembly(code: str, target: str) -> str:
    """Return the assembly of a module for any target, present or not."""
    return str(_machine(target, host=False)[1].emit_assembly(_optimised(code, target, host=False)))


@cache
def native(target: str | None = None) -> Native:
    """Compile for this machine (about a second, once); `target` forces a narrower one."""
    import llvmlite.binding as llvm

    chosen = target or host_target()
    gemv, dequant, engines = {}, {}, []
    for code in ("nf4", "int4"):
        engine = llvm.create_mcjit_compiler(_optimised(code, chosen, host=True), _machine(chosen, host=True)[1])
        engine.finalize_object()
        engines.append(engine)
        pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 5
        for rows in ROWS:
            gemv[code, rows] = _function(engine, f"gemv{rows}", [*pointers, *sizes])
        dequant[code] = _function(engine, "dequant", [*[ctypes.c_void_p] * 3, ctypes.c_int64])
    adapter = _function(engines[0], "ready", [*[ctypes.c_void_p] * 3, ctypes.c_float, *[ctypes.c_int64] * 3])
    return Native(chosen, gemv, dequant, adapter, tuple(engines))


def _function(engine: Any, name: str, arguments: list[Any]) -> Any:
    return ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name))


@cache
def _machine(target: str, host: bool) -> tuple[Any, Any]:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu, features = TARGETS[target]
    if host and target == host_target():
        triple, cpu = llvm.get_process_triple(), llvm.get_host_cpu_name()
        features = llvm.get_host_cpu_features().flatten()
    if target == "avx512":  # the default of LLVM halves the vectors
        features = ",".join(filter(None, (features, "-prefer-256-bit")))
    return triple, llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3, jit=host)


def _optimised(code: str, target: str, host: bool) -> Any:
    import llvmlite.binding as llvm

    triple, machine = _machine(target, host)
    module = llvm.parse_assembly(f'target triple = "{triple}"\n' + module_text(code, target))
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return module
