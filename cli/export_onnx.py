"""adaptc export --onnx: slots in an ONNX model, `.onnx_adapter` files, graphs that decode codes, merged models."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.cli.exporting import Request
from adaptc.errors import UsageError

if TYPE_CHECKING:
    from adaptc.cli.reading import Opened
    from adaptc.formats.onnx.export import Made, Plan

HELP = "An ONNX model with the adapter, or what one with slots loads."
OPTIONS = (
    click.Option(["--slots"], type=click.Choice(["optional", "required"]),
                 help="Give the base inputs for the adapter: with rank-0 defaults, or without any (the browser)."),
    click.Option(["--adapter-only"], is_flag=True, help="Write only the .onnx_adapter for a base that has slots."),
    click.Option(["--expander"], is_flag=True, help="Write a graph that decodes the adapter's codes for the slots."),
    click.Option(["--merge"], type=click.Choice(["load", "disk"]),
                 help="Fold the adapter into the base's float weights: when a session is made, or now."),
    click.Option(["--store"], type=click.Choice(["float32", "float16", "int8", "nf4", "2bit", "ternary", "sign"]),
                 help="What the slots hold: floats, or codes that the graph decodes."),
    click.Option(["--bits"], type=click.FloatRange(0.1, 8), metavar="X",
                 help="Bits a parameter that --store sign may take (1)."),
    click.Option(["--target"], type=click.Choice(["ort-cpu", "ort-mobile", "ort-web", "generic"]), metavar="NAME",
                 help="ort-cpu, ort-mobile (int8 slots), ort-web (required slots), generic (that, no functions)."),
    click.Option(["--weights"], type=click.Path(), metavar="DIR",
                 help="Folder of the base's safetensors: finds modules by value, resolves changes of base weights."),
)


def export(request: Request, *, slots: str | None, adapter_only: bool, expander: bool, merge: str | None,
           store: str | None, bits: float | None, target: str | None, weights: str | None) -> None:
    """Write the artefacts of one mode into a folder; with none named, optional slots and the adapter's file."""
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.formats.atomic import check, staged
    from adaptc.formats.onnx.export import Plan
    from adaptc.formats.onnx.export import export as write

    if request.base is None:
        raise UsageError("--onnx wants a base", hint="--base takes an ONNX file, or the folder of the base model")
    if bits is not None and store != "sign":
        raise UsageError("--bits is the budget of --store sign")
    web = target in ("ort-web", "generic")
    if not (slots or adapter_only or expander or merge):
        slots = "required" if web else "optional"
    if slots == "optional" and web:
        raise UsageError(f"{target} cannot feed optional inputs", hint="--slots required")
    if store is None and slots and not expander and target == "ort-mobile":
        store = "int8"
    opened = open_adapter(request.source, request.alpha, request.dialect)
    out = Path(request.output) if request.output else Path(f"{_stem(opened)}-onnx")
    base = Path(request.base)
    inputs = (*opened.inputs, base)
    plan = Plan(slots or "", adapter_only, expander, merge or "", store or "", bits or 1.0, target == "generic",
                _stem(opened), base.name)
    check(out, force=request.force, folder=True, inputs=inputs)
    with ExitStack() as stack:
        model, folder, notes = _base(stack, base, opened)
        held = open_base(weights or folder)
        stack.enter_context(about(request.source))
        temp = stack.enter_context(staged(out, force=request.force, folder=True, inputs=inputs))
        made = write(opened.adapter, model, temp, plan, held)
        made.notes[:0] = notes
    _account(request, opened, plan, made, out)


def _stem(opened: Opened) -> str:
    return opened.source.path.resolve().name.removesuffix(".safetensors").removesuffix(".adaptc") or "adapter"


def _base(stack: ExitStack, base: Path, opened: Opened) -> tuple[Any, str | None, list[str]]:
    """Return the ONNX model, the folder of its weights where it was exported from one, and notes."""
    from tempfile import TemporaryDirectory

    from adaptc.evidence.model import labels_of
    from adaptc.formats.onnx.hf import export_model, is_model_folder, task_of
    from adaptc.formats.onnx.model import open_model

    if not is_model_folder(base):
        return open_model(base), None, []
    labels = labels_of(opened.adapter)
    task = task_of(base, labels)
    temp = Path(stack.enter_context(TemporaryDirectory()))
    model = export_model(base, temp / "model.onnx", task, labels)
    what = {"lm": "a causal language model without cache", "classify": "a classifier", "embed": "an encoder"}[task]
    return model, str(base), [f"{base.name} exported as {what}, opset {model.opset}, IR {model.proto.ir_version}"]


def _account(request: Request, opened: Opened, plan: Plan, made: Made, out: Path) -> None:
    """Say what was written, how modules were found, and what codes lost."""
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.render import Facts, Notes, Table, number
    from adaptc.formats.onnx.values import fp32_nbytes

    ways = Counter(how for _, _, how in made.modules)
    small = sum(n for name, n in made.files.items() if name.endswith(".onnx_adapter") or name == "expander.onnx")
    floats = fp32_nbytes(opened.adapter)
    facts = Facts([("modules", ", ".join(f"{n} by {how}" for how, n in ways.items()) or None),
                   ("error", f"{number(made.error)} of dW in what the slots hold" if made.error else None),
                   ("size", f"{print_nbytes(small)}, {floats / small:.1f} times less than the factors in float32"
                    if small else None)])
    rows = [[key, node, how] for key, node, how in made.modules] if request.voice.verbose else []
    data = {"input": opened.name, "output": str(out), "files": made.files, "notes": made.notes, "error": made.error,
            "modules": [{"parameter": k, "node": n, "how": h} for k, n, h in made.modules],
            "bytes": {"float32": floats, "adapter": small or None}, "store": plan.store or "float32"}
    request.voice.show(data, Table(("parameter", "node", "found by"), rows), facts, Notes(made.notes),
                       Facts([("wrote", f"{out / name}: {print_nbytes(n)}") for name, n in made.files.items()]))
