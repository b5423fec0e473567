"""The outermost frame: exit codes, one line an error, nothing heavy imported for help."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest

from adaptc.cli import main as frame
from adaptc.errors import FormatError, UsageError

LIGHT = """
import sys
from adaptc.cli.main import main
code = main({args!r})
heavy = [m for m in ("torch", "numpy", "scipy", "rich", "safetensors") if m in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], ["compress", "--help"], ["inspect", "--help"],
                                  ["diff", "--help"], ["convert", "--help"], ["run", "--help"]])
def test_help_imports_no_torch(args):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(args=args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adaptc" in done.stdout


def example(name: str, adaptc) -> list[str]:
    """Return the arguments of the last line of a command's help."""
    head, line = adaptc(name, "--help").out.rstrip().splitlines()[-2:]
    assert head.strip() == "Example:"
    program, *args = shlex.split(line)
    assert program == "adaptc"
    assert args[0] == name
    return args


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_help_ends_with_an_example_that_parses(name, adaptc):
    command = frame.cli.get_command(click.Context(frame.cli), name)
    args = example(name, adaptc)
    assert command.make_context(name, args[1:]).params


@pytest.mark.parametrize("name", ["compress", "inspect", "diff", "convert", "run"])
def test_example_runs(name, adaptc, adapter):
    args = example(name, adaptc)
    if name == "diff":
        assert adaptc("compress", "adapter/", "--rank", 7, "-o", "adapter-r8").code == 0
    said = adaptc(*args)
    assert (said.code, said.err) == (0, "")
    assert said.out


def test_usage_error_is_one_line_and_a_hint(adaptc):
    said = adaptc("compress")
    assert said.code == 2
    assert said.out == ""
    assert said.err == "adaptc: missing argument 'IN'\n  hint: adaptc compress --help\n"


def test_unknown_command_names_the_nearest(adaptc):
    said = adaptc("compres", "x")
    assert said.code == 2
    assert "there is no command compres, did you mean compress?" in said.err


@pytest.mark.parametrize(("error", "code", "first"), [
    (FormatError("tensor is short"), 1, "adaptc: tensor is short"),
    (UsageError("rank is 0", hint="from 1"), 2, "adaptc: rank is 0"),
    (click.UsageError("Bad thing."), 2, "adaptc: bad thing"),
    (KeyboardInterrupt(), 130, "adaptc: interrupted"),
    (PermissionError(13, "Permission denied", "x.bin"), 1, "adaptc: x.bin: Permission denied"),
    (KeyError("gone"), 70, "adaptc: internal error, please report it: KeyError: 'gone'"),
])
def test_failures_are_told_in_one_line(error, code, first, adaptc, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(frame.cli, "invoke", fail)
    said = adaptc("inspect", "x")
    assert said.code == code
    assert said.err.strip().splitlines()[0] == first
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback(adaptc, monkeypatch):
    monkeypatch.setattr(frame.cli, "invoke", lambda *_: 1 / 0)
    monkeypatch.setenv("ADAPTC_DEBUG", "1")
    assert "Traceback" in adaptc("inspect", "x").err


@pytest.mark.parametrize(("message", "told"), [
    ("adapter: broken", "adapter: broken"),
    ("adapter_model.safetensors: truncated", "adapter/adapter_model.safetensors: truncated"),
    ("lora_A is missing", "adapter: lora_A is missing"),
    ("adapter does not exist", "adapter does not exist"),
])
def test_path_is_said_once(message, told, adapter):
    error = FormatError(message)
    error.path = "adapter"
    assert frame._told(error) == told


def test_closed_pipe_is_quiet(adapter):
    reader = subprocess.Popen([sys.executable, "-m", "adaptc", "inspect", "adapter", "--json"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    reader.stdout.close()
    assert reader.wait(60) in (0, 1)
    assert reader.stderr.read() == b""
