"""Every hostile input ends in one clear line, exit 1 or 2, no output, nothing left behind, and the input untouched."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bytes_of import CONFIG, folder, pack, ramp, whole
from hostile import ATTACKS, LONG

from adaptc.cli.main import main


def tree(at: Path) -> dict[str, str]:
    """Return everything under a folder: kinds, links, contents."""
    out = {}
    for path in sorted(at.rglob("*")):
        mode = path.lstat().st_mode
        held = os.readlink(path) if stat.S_ISLNK(mode) else ""
        if stat.S_ISREG(mode):
            held = hashlib.sha256(path.read_bytes()).hexdigest()
        out[str(path.relative_to(at))] = f"{stat.S_IFMT(mode):o} {held}"
    return out


@pytest.fixture
def bounded() -> Iterator[None]:
    """Stop a test that hangs; on a sound reader none comes near."""
    def stop(*_: object) -> None:
        raise TimeoutError("still at it after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(code: int, err: str, out: str, says: str) -> None:
    """Fail unless a run ended as a refusal must."""
    lines = err.splitlines()
    assert code in (1, 2), err
    assert lines[0].startswith("adaptc: "), err
    assert [line for line in lines[1:] if not line.startswith(("  hint: ", "  lost: "))] == []
    assert "Traceback" not in err
    assert "internal error" not in err
    assert all(c.isprintable() or c == "\n" for c in err)
    assert len(lines[0]) > len("adaptc: x")
    assert says.lower() in err.lower()
    assert out == ""


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    build, says = ATTACKS[name]
    args = build(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main(["compress", *args])
    out, err = capfd.readouterr()
    refused(code, err, out, says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["pickle-runs-code", "nan-in-a"])
def test_attack_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    build, says = ATTACKS[name]
    args = build(tmp_path)
    before = tree(tmp_path)
    done = subprocess.run([sys.executable, "-m", "adaptc", "compress", *args], capture_output=True, text=True,
                          timeout=120, check=False)
    refused(done.returncode, done.stderr, done.stdout, says)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("pattern", ["((((a+)+)+)+)+!", "(a|a)*!", "(.*)*(.*)*(.*)*(.*)*(.*)*!", "(a?){300}a{300}!"])
def test_exponential_pattern_does_not_stall(pattern: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path, whole(LONG), {**CONFIG, "rank_pattern": {pattern: 8}, "alpha_pattern": {pattern: 1}})
    assert main(["compress", str(made), "-o", str(tmp_path / "out"), "--rank", "2"]) == 0
    assert capfd.readouterr().err == ""


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 25


def test_odd_but_sound_input_is_compressed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Unicode module names, a carried scalar and an unknown config field are no attacks."""
    name = "base_model.model.слой.層.q_proj"
    tensors = {f"{name}.lora_A.weight": ramp(4, 16), f"{name}.lora_B.weight": ramp(12, 4),
               "base_model.model.logit_scale": torch.tensor(2.5)}
    header = {"__metadata__": {"Zeichen": "äöü"}}
    data = b""
    for key, t in tensors.items():
        raw = t.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}  # type: ignore[assignment]
        data += raw
    made = folder(tmp_path, pack(header, data), {**CONFIG, "from_a_newer_peft": {"x": [1]}})
    assert main(["compress", str(made), "-o", str(tmp_path / "выход"), "--rank", "2"]) == 0
    capfd.readouterr()
    assert (tmp_path / "выход" / "adapter_model.safetensors").is_file()
    assert main(["inspect", str(tmp_path / "выход")]) == 0
    assert "層" in capfd.readouterr().out
