"""Every hostile container is refused by every command in one clear line, within bounded memory and time."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from boxes import Manifest, broken, group_of, raw, sound
from container_attacks import ATTACKS
from test_attacks import bounded, refused, tree

from adaptc.cli.main import main

__all__ = ["bounded"]
HEADROOM = 1 << 30  # bytes that refusing may take beside what the process holds already
ARGUMENTS = {"inspect": [], "verify": [], "compress": ["--rank", "2", "-o", "out.adaptc.safetensors"],
             "decode": ["--to", "peft", "--allow-loss", "-o", "out"]}


@pytest.fixture
def lean() -> Iterator[None]:
    """Limit the address space, so that an allocation by what a file claims fails at once."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc to read the size of this process from")
    held = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("bounded", "lean")
@pytest.mark.parametrize("name", ATTACKS)
def test_container_is_refused_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    build, says, commands = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.adaptc.safetensors"
    file.write_bytes(build())
    before = tree(tmp_path)
    for command in commands:
        code = main([command, str(file), *ARGUMENTS[command]])
        out, err = capfd.readouterr()
        refused(code, err, out, says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["inspect", "verify", "compress", "decode"])
def test_the_sound_container_is_not_refused(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.adaptc.safetensors").write_bytes(sound())
    assert main([command, "x.adaptc.safetensors", *ARGUMENTS[command]]) == 0, capfd.readouterr().err


@pytest.mark.usefixtures("bounded", "lean")
@pytest.mark.parametrize("command", ["inspect", "verify", "compress"])
def test_giant_shapes_that_hold_little_take_little(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are no lie here: nothing, or three entries, of a parameter that would fill 256 GiB."""
    def edit(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        manifest["codes"] = [{"codec": "directions", "modules": [["m.{0-99}.weight", [2**18, 2**18]]],
                              "config": {"dtype": "F32", "scale": 1.0}}]
        sparse = group_of(manifest, "sparse")
        manifest["groups"] = [sparse[1]]
        sparse[1]["form"]["shape"] = [2**18, 2**18]
        kept = {f"g0.{j}": tensors[f"g{sparse[0]}.{j}"] for j in range(2)}
        kept |= {k: t for k, t in tensors.items() if k.startswith(("carried", "origin"))}
        tensors.clear()
        tensors.update(kept | {"index.0": raw(b""), "payload.0": raw(b"")})

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.adaptc.safetensors").write_bytes(broken(edit))
    assert main([command, "x.adaptc.safetensors", *ARGUMENTS[command]]) == 0, capfd.readouterr().err
