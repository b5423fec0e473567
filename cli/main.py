"""adaptc on the command line: commands are imported when they are used, every failure is told in one line."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

from adaptc import __version__
from adaptc.cli.options import example
from adaptc.errors import AdaptcError, LossError, one_line

COMMANDS = ("compress", "quantize", "merge", "sparsify", "qwha", "prune", "calibrate", "compare", "inspect", "diff",
            "eval", "sweep", "report", "convert", "export", "run", "batch", "decode", "verify")
INTERRUPTED, TERMINATED, BUG = 130, 143, 70


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwind as for ^C, so that nothing half written stays."""


class Commands(click.Group):
    """The commands of COMMANDS, each `command` in the module of its name. None of them imports torch to be listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of a first session with adaptc."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name, None for an unknown one."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"adaptc.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]
                        ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, naming the nearest one where there is none."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            meant = f", did you mean {near[0]}?" if near else f" (there are {', '.join(COMMANDS)})"
            ctx.fail(f"there is no command {args[0]}{meant}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, invoke_without_command=True, epilog=example("adaptc compress adapter/ --rank 8"),
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="adaptc %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """The compiler for adapters: LoRA-family checkpoints made small, exactly, and put where they have to run.

    Every command reads PEFT, MLX and other dialects in files or folders, and Hub ids. Exit status: 0 done, 1 something
    is wrong with the data, 2 with the request.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 data, 2 usage, 70 a bug of adaptc, 130 interrupted."""
    debug = os.environ.get("ADAPTC_DEBUG") == "1"
    if not debug:
        warnings.simplefilter("ignore")  # facts go in the report; what libraries mutter is not one
    if args is None:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(args=None if args is None else list(args), prog_name="adaptc", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except AdaptcError as e:
        return _fail(_told(e), e.hint, e.exit_code, debug, e.losses if isinstance(e, LossError) else ())
    except click.ClickException as e:
        ctx = getattr(e, "ctx", None)
        where = ctx.command_path if ctx is not None else "adaptc"
        text = e.format_message().rstrip(".")
        return _fail(text[:1].lower() + text[1:], f"{where} --help", e.exit_code, debug)
    except (click.Abort, KeyboardInterrupt) as e:
        if isinstance(e, Terminated) or isinstance(e.__cause__, Terminated):  # click makes Abort of it
            return _fail("terminated", None, TERMINATED, debug)
        return _fail("interrupted", None, INTERRUPTED, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; what is buffered is dropped
        return 1
    except MemoryError:
        return _fail("out of memory", "--jobs 1 holds fewer modules at a time", 1, debug)
    except OSError as e:
        return _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e), None, 1, debug)
    except Exception as e:
        if isinstance(e, RuntimeError) and "allocate" in str(e) and "memory" in str(e):  # torch has no type for it
            return _fail("out of memory", "--jobs 1 holds fewer modules at a time", 1, debug)
        what = f"internal error, please report it: {type(e).__name__}: {e}"
        return _fail(what, "ADAPTC_DEBUG=1 shows where it happened", BUG, debug)


def _terminate(*_: object) -> None:
    raise Terminated


def _told(e: AdaptcError) -> str:
    """Return the message with the path it is about in front, once."""
    message, path = str(e), e.path
    if path is None or message.startswith(tuple(path + after for after in (":", " ", "/"))):
        return message
    head, sep, tail = message.partition(": ")
    if sep and head == Path(path).name:
        return f"{path}: {tail}"
    if sep and (Path(path) / head).is_file():
        return f"{Path(path) / head}: {tail}"
    return f"{path}: {message}"


def _fail(text: str, hint: str | None, code: int, debug: bool, losses: Sequence[str] = ()) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"adaptc: {one_line(text)}", err=True)
    for loss in losses[:40]:
        click.echo(f"  lost: {one_line(loss)}", err=True)
    if len(losses) > 40:
        click.echo(f"  lost: {len(losses) - 40} more", err=True)
    if hint:
        click.echo(f"  hint: {one_line(hint)}", err=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
