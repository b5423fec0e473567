"""Outputs appear whole or not at all, whatever stops the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptc.errors import AdaptcError, UsageError
from adaptc.formats import atomic
from adaptc.formats.atomic import check, staged


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_appears_when_all_is_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "x.bin"
    with staged(out) as temp:
        temp.write_bytes(b"abc")
        assert not out.exists()
        assert temp.parent.parent == out.parent  # same file system: the rename is one step
    assert out.read_bytes() == b"abc"
    assert names(out.parent) == ["x.bin"]


@pytest.mark.parametrize("folder", [False, True])
def test_failure_leaves_no_trace(folder: bool, tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "a" / "b" / "x", folder=folder) as temp:
            (temp / "f" if folder else temp).write_bytes(b"abc")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []


def test_full_disk_is_told_as_such(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "x"):
            raise OSError(28, "No space left on device")

    with pytest.raises(AdaptcError, match="No space left"):
        fail()
    assert names(tmp_path) == []


def test_folder_is_exchanged_whole(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    for content in (b"1", b"2"):
        with staged(out, folder=True, force=True) as temp:
            (temp / "a").write_bytes(content)
            (temp / "b").write_bytes(content)
    assert (out / "a").read_bytes() == (out / "b").read_bytes() == b"2"
    assert names(tmp_path) == ["adapter"]


def test_folder_is_exchanged_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: 38)
    test_folder_is_exchanged_whole(tmp_path)
    test_file_appears_when_all_is_written(tmp_path)


def test_failed_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "a").write_bytes(b"old")
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: 38)
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: real(a, b) if Path(b) != out or "old" in Path(a).name else fail())

    def fail() -> None:
        raise OSError(5, "Input/output error")

    def replace() -> None:
        with staged(out, folder=True, force=True) as temp:
            (temp / "a").write_bytes(b"new")

    with pytest.raises(AdaptcError, match="Input/output"):
        replace()
    assert (out / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["adapter"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "x"

    def race() -> None:
        with staged(out) as temp:
            temp.write_bytes(b"ours")
            out.write_bytes(b"theirs")

    with pytest.raises(AdaptcError, match="exists"):
        race()
    assert out.read_bytes() == b"theirs"


def test_a_link_is_replaced_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with staged(tmp_path / "link", force=True) as temp:
        temp.write_bytes(b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_bytes(b"mine")

    def replace() -> None:
        with staged(tmp_path / "out", folder=True, force=True) as temp:
            (temp / "a").write_bytes(b"1")

    with pytest.raises(UsageError, match="thesis"):
        replace()
    assert names(tmp_path / "out") == ["thesis"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "x\0y"])
def test_names_that_are_no_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        check(Path(name), force=True)


def test_inputs_are_recognised_behind_links(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"1")
    os.link(tmp_path / "in", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "in")
    for name in ("in", "hard", "soft"):
        with pytest.raises(UsageError, match="never overwritten"):
            check(tmp_path / name, force=True, inputs=(tmp_path / "in",))


KILLED = """
import os, signal, sys
from pathlib import Path
from adaptc.formats import atomic
out, folder, moment = Path(sys.argv[1]), sys.argv[2] == "folder", int(sys.argv[3])
calls = 0
def step(real):
    def counted(*args):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return counted
for name in ("_flush", "_exchange", "_renameat2"):
    setattr(atomic, name, step(getattr(atomic, name)))
os.replace = step(os.replace)
with atomic.staged(out, force=True, folder=folder) as temp:
    for name in ("a", "b"):
        with open(temp / name if folder else temp, "wb") as f:
            f.write(b"new " * 100_000)
            step(len)(())
"""


@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_leaves_the_old_or_the_new(folder: bool, tmp_path: Path) -> None:
    """SIGKILL before every step of a replacement in turn, until one run gets through."""
    seen = set()
    for moment in range(1, 20):
        out = tmp_path / f"out{moment}"
        files = [out / "a", out / "b"] if folder else [out]
        if folder:
            out.mkdir()
        for file in files:
            file.write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), "folder" if folder else "file", str(moment)],
                              check=False)
        states = {f.read_bytes() for f in files}
        assert len(states) == 1
        assert states <= {b"old", b"new " * 100_000}
        assert len(list(out.iterdir()) if folder else [out]) == len(files)
        seen |= states
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert seen == {b"old", b"new " * 100_000}
