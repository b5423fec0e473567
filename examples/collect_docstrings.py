#!/usr/bin/env python3
"""Collect docstrings of the standard library, labelled by the area they document.

    python examples/collect_docstrings.py

Writes docstrings.tsv (test rows) and docstrings-train.tsv beside this file, one `label TAB text` a line.
The committed rows come from CPython 3.11.7; another Python gives other rows, so run this only to make a new task.
"""

import ast
import hashlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
AREAS = {
    "gui": "tkinter turtle turtledemo",
    "editor": "idlelib",
    "concurrency": "asyncio concurrent multiprocessing threading subprocess queue selectors sched",
    "mail": "email mailbox smtplib imaplib poplib nntplib mailcap mimetypes",
    "web": "http urllib wsgiref xmlrpc ftplib socketserver socket ssl cgi telnetlib webbrowser html",
    "imports": "importlib pkgutil runpy zipimport modulefinder site",
    "numbers": "_pydecimal statistics fractions numbers random datetime calendar _strptime ipaddress",
    "testing": "unittest doctest",
    "source": "ast inspect dis pydoc lib2to3 symtable pdb bdb tokenize trace traceback cmd code",
    "packaging": "distutils venv ensurepip sysconfig",
    "xml": "xml plistlib",
    "files": "tarfile zipfile gzip bz2 lzma shutil pathlib tempfile _pyio os posixpath glob filecmp fileinput",
}
LABELS = {area: number for number, area in enumerate(AREAS)}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "pgen2", "fixes"}
CHARACTERS = 280  # more than the 64 tokens that the model sees
OVERLAP = 0.8  # the share of common words at which a training row is too like a test row
WORDS = 5  # the shortest docstring worth classifying


def docstrings(path: pathlib.Path) -> Iterator[str]:
    """Yield the docstrings of one source file, white space collapsed, clipped to CHARACTERS."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split()) >= WORDS:
                yield text[:CHARACTERS].strip()


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, the form in which duplicates are found."""
    return re.findall(r"[a-z]+", text.lower())


def collect(root: pathlib.Path) -> list[tuple[str, str]]:
    """Return sorted (area, text) rows without duplicates; texts that occur in two areas are dropped from both."""
    found: dict[str, dict[str, str]] = {}  # words of the text -> area -> text
    for area, names in AREAS.items():
        for name in names.split():
            files = [root / f"{name}.py"] if (root / f"{name}.py").exists() else sorted((root / name).rglob("*.py"))
            for path in files:
                if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
                    for text in docstrings(path):
                        found.setdefault(" ".join(words(text)), {}).setdefault(area, text)
    return sorted(next(iter(areas.items())) for areas in found.values() if len(areas) == 1)


def is_test(text: str) -> bool:
    """Say which side a row falls on; rows that open with the same four words fall on the same side."""
    return hashlib.sha256(" ".join(words(text)[:4]).encode()).digest()[0] < 64  # a quarter of 256


def unlike(rows: list[tuple[str, str]], others: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows that share fewer than OVERLAP of their distinct words with every other row."""
    seen = [frozenset(words(text)) for _, text in others]
    kept = []
    for area, text in rows:
        mine = frozenset(words(text))
        if all(len(mine & theirs) < OVERLAP * len(mine | theirs) for theirs in seen):
            kept.append((area, text))
    return kept


def main() -> None:
    """Write both files and print how many rows each area has."""
    rows = collect(pathlib.Path(sysconfig.get_paths()["stdlib"]))
    test = [row for row in rows if is_test(row[1])]
    train = unlike([row for row in rows if not is_test(row[1])], test)
    for name, side in ("docstrings.tsv", test), ("docstrings-train.tsv", train):
        (HERE / name).write_text("".join(f"{LABELS[area]}\t{text}\n" for area, text in side), encoding="utf8")
    for area in AREAS:
        print(f"{area:12}", *(f"{sum(row[0] == area for row in side):5}" for side in (train, test)))


if __name__ == "__main__":
    main()
