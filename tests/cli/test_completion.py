"""Completion in real shells, by the lines of docs/completion.md."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ADAPTC = Path(sys.executable).with_name("adaptc")
ENV = {**os.environ, "PATH": f"{ADAPTC.parent}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
CASES = [("adaptc qu", {"quantize"}), ("adaptc quantize --me", {"--method"}),
         ("adaptc quantize --method n", {"nf4"}), ("adaptc batch --engine ", {"local", "ray", "serial"})]


def shell(name: str) -> str:
    if not ADAPTC.exists():
        pytest.skip(f"no adaptc command beside {sys.executable}")
    return shutil.which(name) or pytest.skip(f"no {name} here")


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash(line: str, expected: set[str]) -> None:
    script = f"""
eval "$(_ADAPTC_COMPLETE=bash_source adaptc)"
COMP_WORDS=({line}{' ""' if line.endswith(' ') else ''}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p adaptc | sed 's/.*-F \\([^ ]*\\) .*/\\1/') adaptc
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run([shell("bash"), "--norc", "-c", script], env=ENV, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish(line: str, expected: set[str], tmp_path: Path) -> None:
    script = f"_ADAPTC_COMPLETE=fish_source adaptc | source; complete -C '{line}'"
    done = subprocess.run([shell("fish"), "--no-config", "-c", script], env=ENV | {"HOME": str(tmp_path)},
                          capture_output=True, text=True, check=True)
    assert {row.split("\t")[0] for row in done.stdout.splitlines()} == expected


def test_zsh(tmp_path: Path) -> None:
    """zsh completes only at a terminal: one is given to it, and a Tab is pressed."""
    ours, theirs = pty.openpty()
    zsh = subprocess.Popen([shell("zsh"), "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
                           env=ENV | {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}, start_new_session=True)
    os.close(theirs)
    try:
        os.write(ours, b"PS1=; unsetopt zle_bracketed_paste; autoload -U compinit && compinit -u -D; "
                       b'eval "$(_ADAPTC_COMPLETE=zsh_source adaptc)"; echo rea""dy\n')
        read_until(ours, "ready")
        os.write(ours, b"adaptc qu\t")
        read_until(ours, r"quantize ")
        os.write(ours, b"--me\t")
        read_until(ours, r"--method ")
    finally:
        zsh.kill()
        zsh.wait()
        os.close(ours)


def read_until(fd: int, pattern: str, seconds: float = 60.0) -> None:
    seen, end = "", time.monotonic() + seconds
    while not re.search(pattern, seen):
        assert time.monotonic() < end, f"{pattern!r} never came, only {seen!r}"
        if select.select([fd], [], [], 1.0)[0]:
            seen += os.read(fd, 4096).decode(errors="replace")


def test_completing_does_not_load_torch() -> None:
    script = """
import sys
from adaptc.cli.main import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    for words, at in (("adaptc ", "1"), ("adaptc batch --engine r", "3")):
        env = {"_ADAPTC_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": at}
        done = subprocess.run([sys.executable, "-c", script], env=ENV | env,
                              capture_output=True, text=True, check=True)
        assert done.stdout
