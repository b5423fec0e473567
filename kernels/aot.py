"""Compile every Triton kernel ahead of time, without a GPU, and table what it needs.

`python -m adaptc.kernels.aot FILE` writes the table.

Each kernel is recorded from a real launch on meta tensors, so what is compiled is what would run. Triton compiles for
targets that are not present; it reports shared memory, and for NVIDIA the assembler's log gives registers and spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from adaptc.kernels import specimens

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes of shared memory one program may have
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel and keeps the arguments of every launch."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a launcher that records instead of running."""
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(launch: Callable[[], Any], modules: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Run a launcher with every kernel of `modules` replaced by a recorder."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    patches = [
        mock.patch.object(module, name, Recorder(getattr(module, name), launches))
        for module in modules
        for name in dir(module)
        if name.endswith("_kernel")
    ]
    for patch in patches:
        patch.start()
    try:
        launch()
    finally:
        for patch in patches:
            patch.stop()
    return launches


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: str) -> dict[str, int]:
    """Compile one recorded launch; return shared bytes, and for NVIDIA registers and spilled bytes of a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: kwargs[key] for key in ("num_warps", "num_stages") if key in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    if target == "gfx942":  # the PTX lookup is NVIDIA's, and a workgroup has 64 KiB: no deep pipeline
        values |= {"ASM": False} if "ASM" in values else {}
        options["num_stages"] = min(options.get("num_stages", 2), 2)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[i].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTER[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    figures = {"shared": int(built.metadata.shared)}
    if target.startswith("sm_"):
        figures |= _assembled(built.asm["ptx"], target)
    else:
        text = str(built.asm["amdgcn"])
        for key, pattern in (("registers", r"\.vgpr_count:\s+(\d+)"), ("spills", r"\.vgpr_spill_count:\s+(\d+)")):
            found = re.search(pattern, text)
            figures[key] = int(found.group(1)) if found else -1
    return figures


def _assembled(ptx: str, target: str) -> dict[str, int]:
    """Return what ptxas reports for a kernel."""
    from triton import knobs

    arch = "sm_90a" if target == "sm_90" else target
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={arch}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    return {"registers": int(registers[1]) if registers else -1, "spills": int(spills[1]) if spills else -1}


def table(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield (launch, target, figures) for every specimen; a kernel launched twice by one specimen is numbered."""
    for name, launch, modules in specimens.launches():
        for i, (kernel, args, kwargs) in enumerate(record(launch, modules)):
            for target in targets:
                yield (
                    f"{name}/{kernel.__name__}" + (f".{i}" if i else ""),
                    target,
                    compile_launch(kernel, args, kwargs, target),
                )


def main() -> None:
    """Write the table as JSON, one line a launch."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for name, target, figures in table():
        rows.setdefault(name, {})[target] = figures
        print(name, target, figures, flush=True)
    import triton

    lines = [f'"limits": {json.dumps(LIMITS)}', *(f'"{name}": {json.dumps(row)}' for name, row in rows.items())]
    Path(sys.argv[1]).write_text(f'{{"triton": "{triton.__version__}",\n' + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
