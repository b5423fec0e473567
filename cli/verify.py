"""adaptc verify: whether a container is whole, and whether a runtime does with an artefact what it should."""

from __future__ import annotations

from pathlib import Path

import click

from adaptc.cli.options import example, input_argument, speaking
from adaptc.cli.render import Voice

RUNTIMES = {"llama-cpp": "verify_llama_cpp", "ort": "verify_ort", "ort-genai": "verify_ort_genai",
            "peft": "verify_peft"}


@click.command("verify", short_help="Check a container, or what a runtime makes of an artefact.",
               epilog=example("adaptc verify adapter.gguf --runtime llama-cpp --base model.gguf --adapter adapter/"))
@input_argument("FILE")
@click.option("--base", type=click.Path(), metavar="PATH",
              help="Base model that must be the one it was made for; with --runtime, the one that the runtime runs.")
@click.option("--runtime", type=click.Choice(list(RUNTIMES)), help="Run FILE on the base by this runtime.")
@click.option("--adapter", type=click.Path(), metavar="IN",
              help="With --runtime: what FILE was made from, compared with it too.")
@click.option("--reference", type=click.Path(), metavar="DIR",
              help="With --runtime: the base model for torch, where it cannot be loaded from --base.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT",
              help="With --runtime: run this text instead of random tokens; repeatable.")
@speaking
def command(file: str, base: str | None, runtime: str | None, adapter: str | None, reference: str | None,
            prompts: tuple[str, ...], voice: Voice) -> None:
    """Check FILE whole: manifest, every checksum, finite values of every decoded factor, and the base's fingerprint.

    With --runtime, run the real consumer with and without the adapter and compare with torch: fails on no effect, wrong
    scale, wrong permutation and wrong base, naming which.
    """
    if runtime is not None:
        _run(file, base, runtime, adapter, reference, prompts, voice)
        return
    for name, value in (("adapter", adapter), ("reference", reference), ("prompt", prompts)):
        if value:
            raise click.UsageError(f"--{name} is for --runtime")
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.cli.render import Facts, Notes, count
    from adaptc.formats.verify import verify

    opened = open_adapter(file)
    with about(file):
        found = verify(opened.source, opened.adapter, open_base(base))
    facts = Facts([("structure", f"{count(opened.adapter.deltas, 'module')}, {found.tensors} tensors, all named once"),
                   ("checksums", f"{found.checked} of {found.tensors} match"), ("values", "all finite"),
                   ("base", found.base)])
    voice.show({"input": opened.name, "ok": True, "tensors": found.tensors, "checksums": found.checked,
                "base": found.base, "notes": list(opened.adapter.origin.notes)},
               facts, Notes(opened.adapter.origin.notes), f"{opened.name} is whole")


def _run(file: str, base: str | None, runtime: str, adapter: str | None, reference: str | None,
         prompts: tuple[str, ...], voice: Voice) -> None:
    """Show what was measured; end with the first thing that is wrong."""
    from importlib import import_module

    from adaptc.cli.reading import about, open_adapter
    from adaptc.cli.render import Notes, Table, number
    from adaptc.errors import FormatError, UsageError

    if base is None:
        raise click.UsageError(f"--runtime {runtime} needs --base, the model that it runs")
    if not Path(file).exists():
        raise UsageError(f"{file} does not exist")
    source = open_adapter(adapter).adapter if adapter is not None else None
    with about(file):
        module = import_module(f"adaptc.evidence.{RUNTIMES[runtime]}")
        found = module.verify(Path(file), Path(base), source, Path(reference) if reference else None, prompts)
    wrong = [v for v in found if not v.ok]
    notes = [v.said for v in found if v.ok]
    if source is None and not wrong:
        notes.append("--adapter with what it was made from would also show a scale or an order of rows that is wrong "
                     "in the file itself")
    data = {"input": file, "runtime": runtime, "base": base, "ok": not wrong,
            "checks": [{"ok": v.ok, "cause": v.cause, "said": v.said, "figures": dict(v.figures)} for v in found]}
    rows = [(name, number(value)) for v in found for name, value in v.figures.items()]
    voice.show(data, Table(("figure", ">value"), [(name.replace("_", " "), value) for name, value in rows]),
               Notes(notes), *([] if wrong else [f"{file} does in {runtime} what it does in torch"]))
    if wrong:
        with about(file):
            raise FormatError(f"{wrong[0].cause}, {wrong[0].said}")
