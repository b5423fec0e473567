#!/usr/bin/env python3
"""The main job on the bundled adapter: look at it, compress it, quantize it, and compare. Run by `make demo`."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ADAPTER = HERE / "docstrings-adapter"
OUT = HERE.parent / "build" / "demo"


def adaptc(*arguments: str) -> None:
    """Show a command and run it."""
    print(f"\n$ adaptc {' '.join(arguments)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "adaptc", *arguments], check=True)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    source, small, tiny = (str(p.relative_to(Path.cwd())) if p.is_relative_to(Path.cwd()) else str(p) for p in
                           (ADAPTER, OUT / "docstrings-r8", OUT / "docstrings-40KB"))
    adaptc("inspect", source)
    adaptc("compress", source, "-o", small, "--rank", "8")
    adaptc("quantize", source, "-o", tiny, "--size", "40KB")
    adaptc("diff", small, tiny)
    print("\nWhat that costs in accuracy is in the README; `python examples/table.py` measures it again.")


if __name__ == "__main__":
    main()
