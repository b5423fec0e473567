"""Published adapters: read with every tensor accounted for, or refused by name; untouched, the bits come back."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.shared

REFUSED = {"peft-finegates-unknown-type": "FINEGATES is not known", "peft-unilora-roberta": "indices"}
# Read, but no dialect says the same without the base weights, or PEFT itself could not load it as it was stored.
REWRITTEN = {"peft-mt0-large_IA3": "ia3", "peft-reg-ia3_conv2d-0.6.1": "ia3", "peft-reg-ia3_mlp-0.6.1": "ia3",
             "peft-reg-ia3_no_ff_mlp-0.6.1": "ia3", "peft-reg-adalora_mlp-0.6.1": "same ΔW",
             "bloom560m-alpaca-r8-bin": "same ΔW"}


@pytest.fixture(scope="module")
def table(shared: Path) -> dict[str, object]:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "corpus_table.py"
    spec = importlib.util.spec_from_file_location("corpus_table", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["corpus_table"] = module
    spec.loader.exec_module(module)
    return {row.name: row for row in module.rows(shared / "corpus")}


def test_all_folders_are_read_or_refused_by_name(table: dict[str, object]) -> None:
    assert len(table) == 34
    refused = {name: row.written for name, row in table.items() if row.dialect == "refused"}  # type: ignore[attr-defined]
    assert set(refused) == set(REFUSED)
    assert all(says in refused[name] for name, says in REFUSED.items())


def test_every_tensor_is_accounted_for(table: dict[str, object]) -> None:
    assert {name: row.lost for name, row in table.items() if row.lost} == {}  # type: ignore[attr-defined]
    assert all(row.deltas for row in table.values() if row.dialect != "refused")  # type: ignore[attr-defined]


def test_untouched_gives_the_same_bits(table: dict[str, object]) -> None:
    for name, row in table.items():
        if name not in REFUSED:
            same = "same file, byte for byte" if "petlvit" in name else "same tensors, bit for bit"
            want = REWRITTEN.get(name, same)
            assert want in row.written, f"{name}: {row.written}"  # type: ignore[attr-defined]
