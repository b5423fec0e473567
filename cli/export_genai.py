"""adaptc export --ort-genai: a model of ORT GenAI with slots, and the adapter file that its Adapters load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.cli import export_onnx
from adaptc.cli.exporting import Request
from adaptc.errors import FormatError, UsageError

if TYPE_CHECKING:
    from adaptc.formats.onnx.export import Made

HELP = "A model of ORT GenAI with slots, and its adapter file."
OPTIONS: tuple[click.Option, ...] = tuple(o for o in export_onnx.OPTIONS if o.name in ("store", "bits", "weights"))


def export(request: Request, *, store: str | None, bits: float | None, weights: str | None) -> None:
    """Write a folder that og.Model opens: the base with optional slots; of a base that has them, the adapter alone."""
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.formats.atomic import check, staged
    from adaptc.formats.onnx.export import Plan
    from adaptc.formats.onnx.export import export as write
    from adaptc.formats.onnx.model import open_model
    from adaptc.formats.onnx.slots import slots_of

    if request.base is None:
        raise UsageError("--ort-genai wants a base", hint="--base takes the folder that ORT GenAI's builder made")
    if bits is not None and store != "sign":
        raise UsageError("--bits is the budget of --store sign")
    folder = Path(request.base)
    graph = folder / decoder_of(folder)
    opened = open_adapter(request.source, request.alpha, request.dialect)
    name = opened.source.path.resolve().name.removesuffix(".safetensors").removesuffix(".adaptc") or "adapter"
    out = Path(request.output) if request.output else Path(f"{name}-genai")
    inputs = (*opened.inputs, folder)
    check(out, force=request.force, folder=True, inputs=inputs)
    model = open_model(graph)
    has = bool(slots_of(model))
    plan = Plan("" if has else "optional", has, store=store or "", bits=bits or 1.0, name=name, base=folder.name)
    with about(request.source), staged(out, force=request.force, folder=True, inputs=inputs) as temp:
        made = write(opened.adapter, model, temp, plan, open_base(weights))
        if not has:
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.name.startswith(graph.name) and not (temp / file.name).exists():
                    shutil.copyfile(file, temp / file.name)
    _account(request, out, folder if has else out, name, made)


def decoder_of(folder: Path) -> str:
    """Return the file of the decoder in an ORT GenAI folder. Raises UsageError or FormatError where there is none."""
    from adaptc.base_files import read_object

    config = folder / "genai_config.json"
    if not config.is_file():
        raise UsageError(f"{folder} is no model of ORT GenAI (no genai_config.json)",
                         hint="python -m onnxruntime_genai.models.builder makes one of a model folder")
    told: Any = read_object(config)
    try:
        found = told["model"]["decoder"]["filename"]
    except (KeyError, TypeError) as e:
        raise FormatError(f"{config}: names no model.decoder.filename") from e
    if not isinstance(found, str) or Path(found).name != found or not (folder / found).is_file():
        raise FormatError(f"{config}: names decoder {str(found)[:60]}, which is not beside it")
    return found


def _account(request: Request, out: Path, model: Path, name: str, made: Made) -> None:
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.render import Notes, count

    load = (f'og.Adapters(model).load("{out / name}.onnx_adapter", "{name}"), then generator.set_active_adapter('
            f'adapters, "{name}"); genai_config.json needs no entry')
    data = {"input": request.source, "output": str(out), "model": str(model), "files": made.files,
            "notes": [*made.notes, load], "modules": [{"parameter": k, "node": n, "how": h}
                                                      for k, n, h in made.modules]}
    request.voice.show(data, Notes([*([f"{count(made.modules, 'module')} given slots"] if made.modules else []),
                                    *made.notes, load]),
                       *(f"wrote {out / file}: {print_nbytes(n)}" for file, n in made.files.items()))
