"""Kernels compile for GPUs that are not here, and need what the committed table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

TABLE = Path(__file__).resolve().parents[2] / "docs" / "kernels-aot.json"
FEW = ("decode/nf4-bfloat16-planes16-m1", "walsh/28x1024-m4", "dora/compose", "sparse/shift")
SCRIPT = """
import json, sys
from adaptc.kernels import aot, specimens
few = sys.argv[1:]
found = {}
for name, launch, modules in specimens.launches():
    if name in few:
        for kernel, args, kwargs in aot.record(launch, modules):
            key = f"{name}/{kernel.__name__}"
            found[key] = {t: aot.compile_launch(kernel, args, kwargs, t) for t in aot.TARGETS}
print(json.dumps(found))
"""


def test_a_few_launches_compile_for_three_targets_as_the_table_says() -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # an interpreted kernel cannot be compiled
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *FEW], capture_output=True, text=True, env=clean, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == len(FEW)
    table = json.loads(TABLE.read_text())
    for name, targets in found.items():
        for target, figures in targets.items():
            if table["triton"] == triton.__version__:
                assert figures == table[name][target], (name, target)
            else:  # another compiler lays registers out otherwise; it must still fit and not spill
                assert figures["shared"] <= table["limits"][target]


def test_the_table_holds_every_kernel_on_every_target_within_its_limits() -> None:
    table = json.loads(TABLE.read_text())
    rows = {name: row for name, row in table.items() if name not in ("triton", "limits")}
    kernels = {name.split("/")[-1].split(".")[0] for name in rows}
    assert kernels == {
        "decode_kernel", "shrink_kernel", "prefill_kernel", "many_decode_kernel", "many_shrink_kernel",
        "many_prefill_kernel", "walsh_kernel", "side_kernel", "exchange_kernel", "norms_kernel", "compose_kernel",
    }  # fmt: skip
    for name, row in rows.items():
        assert set(row) == {"sm_80", "sm_90", "gfx942"}, name
        for target, figures in row.items():
            assert 0 <= figures["shared"] <= table["limits"][target], (name, target)
            assert 0 < figures["registers"] <= 512, (name, target)
