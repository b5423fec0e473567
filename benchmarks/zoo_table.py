"""Write docs/peft-types.md: every oracle checkpoint of PEFT rebuilt or refused, and every PEFT folder of the corpus.

    python benchmarks/zoo_table.py ../shared docs/peft-types.md
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch

import adaptc
from adaptc.delta import NeedsBase, kind
from adaptc.errors import AdaptcError
from adaptc.formats.peft_types import REFUSED, TYPES
from adaptc.resolve import SHAPE_ONLY

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/formats"))
from peft_oracle import error

HEAD = """# PEFT types

Written by `benchmarks/zoo_table.py`; every figure is measured by that run.

adaptc reads {read} values of `peft_type` and refuses {refused} by name. What a type becomes:

* **factors**: low-rank, Kronecker, Hadamard or sparse deltas that any pass can work on, without the base model;
* **shape of W0**: the file does not tell how large the weights are; the base (`--base`) is asked for shapes only;
* **W0**: the change is a function of the base weight; the base (`--base`) turns it into a delta.

Everything that has exact factors is written back as LoRA, which PEFT reloads.

## Checkpoints with PEFT's own merge

One small network for each; "error" is the largest difference of any entry of any merged parameter from what PEFT
merged, relative to the largest entry where that is above 1. The three built on an SVD of W0 (KaSA, PiSSA, PSOFT) carry
the rounding of the float32 SVD that PEFT ran on the machine that made them.

| checkpoint | type | becomes | error, or why it is refused |
|---|---|---|---|
"""


def becomes(adapter: adaptc.Adapter) -> str:
    """Return what an adapter was read as, in the words of the page."""
    kinds = Counter(kind(d) for d in adapter.deltas.values())
    needs = {d.kind for d in adapter.deltas.values() if isinstance(d, NeedsBase)}
    said = ", ".join(sorted(kinds)) or "replacements"
    if adapter.replaced and kinds:
        said += " + replacements"
    return f"{said} ({'shape of W0' if needs <= SHAPE_ONLY else 'W0'})" if needs else said


def zoo_row(folder: Path) -> tuple[str, float | None]:
    """Return the table row of one checkpoint and its error, None where it is refused."""
    config = json.loads((folder / "adapter_config.json").read_text())
    start = f"| {folder.name} | {config['peft_type']} |"
    try:
        adapter = adaptc.load(folder)
    except AdaptcError as e:
        return f"{start} refused | {e}{f' ({e.hint})' if e.hint else ''} |", None
    measured = error(folder)
    return f"{start} {becomes(adapter)} | {measured:.1e} |", measured


def corpus_row(folder: Path) -> str:
    """Return the table row of one real folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    start = f"| {folder.name} | {config['peft_type']} |"
    try:
        adapter = adaptc.load(folder)
    except AdaptcError as e:
        return f"{start} refused | {str(e).partition(' (known')[0]} |"
    carried = f", {len(adapter.replaced)} carried" if adapter.replaced else ""
    return f"{start} {becomes(adapter)} | {len(adapter.deltas)} deltas{carried}, {adapter.nbytes} bytes |"


def main(shared: Path, out: Path) -> None:
    """Measure everything and write the page."""
    torch.set_num_threads(1)
    rows = [zoo_row(d) for d in sorted((shared / "oracles/peft-zoo").iterdir()) if d.is_dir()]
    errors = [e for _, e in rows if e is not None]
    real = [d for d in sorted((shared / "corpus").iterdir())
            if (d / "adapter_config.json").is_file() and "peft_type" in (d / "adapter_config.json").read_text()]
    text = HEAD.format(read=len(TYPES), refused=len(REFUSED)) + "\n".join(row for row, _ in rows)
    text += f"\n\n{len(errors)} of {len(rows)} are rebuilt, the largest error is {max(errors):.1e}; "
    text += f"{len(rows) - len(errors)} are refused.\n\n## Real files\n\n"
    text += "| folder | type | becomes | holds |\n|---|---|---|---|\n" + "\n".join(map(corpus_row, real)) + "\n"
    text += "\n## Refused by name\n\n" + "\n".join(f"* `{k}` {why}" for k, why in sorted(REFUSED.items())) + "\n"
    out.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
