"""adaptc export: an adapter as the artefact that a runtime on a device loads, one target at a time."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import click

from adaptc.cli import export_genai, export_gguf, export_mlx, export_onnx
from adaptc.cli.exporting import Request
from adaptc.cli.options import example, input_argument, reading, speaking
from adaptc.cli.render import Voice

# Flag -> module with HELP (one line), OPTIONS (click options, none required) and export(request, **options), which
# gets the values of its own OPTIONS. None of them imports torch or a runtime before `export` is called.
TARGETS: dict[str, ModuleType] = {"onnx": export_onnx, "gguf": export_gguf, "mlx": export_mlx,
                                  "ort_genai": export_genai}


@click.command("export", short_help="Write what a runtime loads: ONNX, GGUF, MLX.",
               epilog=example("adaptc export adapter/ --onnx --base model.onnx -o phone/"))
@input_argument()
@click.option("--base", type=click.Path(), metavar="PATH", help="Base model, in the form the target asks for.")
@click.option("-o", "--output", type=click.Path(), metavar="OUT", help="Where to write; beside IN by default.")
@click.option("--force", is_flag=True, help="Replace an existing output (never an input).")
@reading
@speaking
def command(source: str, base: str | None, output: str | None, force: bool, alpha: float | None, dialect: str | None,
            voice: Voice, **given: Any) -> None:
    """Write IN as the artefact of one runtime: exactly one of the flags that name a target.

    The base model is read for its structure and, where the adapter only means something on its weights, for those.
    """
    chosen = [t for t in TARGETS if given.pop(f"to_{t}")]
    flags = ", ".join("--" + t.replace("_", "-") for t in TARGETS)
    if len(chosen) != 1:
        raise click.UsageError(f"{'two targets' if chosen else 'no target'}: give one of {flags}")
    target = TARGETS[chosen[0]]
    mine = {option.name for option in target.OPTIONS}
    defaults = {p.name: p.default for p in command.params}
    for name, value in given.items():
        if name not in mine and value not in (None, False, ()) and value != defaults[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is no option of --{chosen[0].replace('_', '-')}")
    request = Request(source, base, output, alpha, dialect, force, voice)
    target.export(request, **{name: value for name, value in given.items() if name in mine})


def _add_targets() -> None:
    """Give the command one flag a target and the options of all of them; a name that two share is one option."""
    flags = [click.Option(["--" + t.replace("_", "-"), f"to_{t}"], is_flag=True, help=m.HELP)
             for t, m in TARGETS.items()]
    options = {option.name: option for m in TARGETS.values() for option in m.OPTIONS}
    command.params[1:1] = flags
    command.params[2 + len(flags) : 2 + len(flags)] = options.values()


_add_targets()
