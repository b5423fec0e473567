"""adaptc export --gguf: an adapter for llama.cpp, in any of its tensor types, read back and measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptc.cli.exporting import Request

if TYPE_CHECKING:
    from adaptc.adapter import Adapter
    from adaptc.cli.render import Table

HELP = "A GGUF adapter for llama.cpp."
_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "tq1_0", "tq2_0", "q1_0"], case_sensitive=False)
ALLOW_LOSS = click.Option(["--allow-loss"], is_flag=True, help="Write even if the target cannot say everything.")
OPTIONS = (
    click.Option(["--type", "both"], type=_TYPES, help="Tensor type of A and B (f16 by default)."),
    click.Option(["--type-a"], type=_TYPES, help="Tensor type of A; q1_0 is one bit and a scale for 128 values."),
    click.Option(["--type-b"], type=_TYPES, help="Tensor type of B; its blocks lie along the rank, which is padded."),
    ALLOW_LOSS,
)


def export(request: Request, both: str | None, type_a: str | None, type_b: str | None, allow_loss: bool) -> None:
    """Write one GGUF file, read it back, and report what each kind of module lost."""
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.reading import about, open_adapter
    from adaptc.cli.render import Notes, number
    from adaptc.cli.writing import target
    from adaptc.difference import diff
    from adaptc.errors import LossError
    from adaptc.formats.atomic import staged
    from adaptc.formats.gguf import Gguf
    from adaptc.formats.gguf_arch import target_of
    from adaptc.formats.source import open_source

    kinds = (type_a or both or "f16", type_b or both or "f16")
    opened = open_adapter(request.source, request.alpha, request.dialect)
    fmt = Gguf(target_of(Path(request.base)) if request.base else None, *kinds)
    tag = kinds[0] if kinds[0] == kinds[1] else "-".join(kinds)
    place = target(opened, request.output, tag, "gguf", request.force)
    with about(request.source):
        adapter = fmt.storable(opened.adapter)
        losses = fmt.cannot(adapter)
        if losses and not allow_loss:
            raise LossError(f"{fmt.title} cannot say everything this adapter holds", losses,
                            hint="--allow-loss writes the rest")
        with staged(place.out, force=request.force, inputs=opened.inputs) as temp:
            fmt.write(adapter, temp)
        made = fmt.read(open_source(place.out))
        error = diff(_written(adapter, made), made).error
    nbytes = place.out.stat().st_size
    types: dict[str, list[str]] = made.origin.config["types"]
    notes = [*place.notes, *_fallbacks(types, kinds)]
    ratio = opened.nbytes / nbytes
    arch = made.origin.config["facts"]["general.architecture"]
    data = {"input": opened.name, "output": str(place.out), "architecture": arch,
            "types": {"a": kinds[0], "b": kinds[1]}, "error": error, "ratio": ratio,
            "bytes": {"before": opened.nbytes, "after": nbytes}, "losses": list(losses), "notes": notes,
            "modules": [{"name": k, "types": types[k], "rank": getattr(d, "rank", None)}
                        for k, d in made.deltas.items()]}
    change = f"{ratio:.3g}x smaller" if ratio >= 1 else f"{1 / ratio:.3g}x larger"
    request.voice.show(data, _table(adapter, made, request.voice.verbose), Notes(notes),
                       Notes([f"lost: {loss}" for loss in losses], wrong=True),
                       f"wrote {place.out}: {arch}, {print_nbytes(nbytes)}, was {print_nbytes(opened.nbytes)} "
                       f"({change}), relative error {number(error)}")


def _written(adapter: Adapter, made: Adapter) -> Adapter:
    """Return the part of an adapter that the file has, without what is carried."""
    return replace(adapter, deltas={k: d for k, d in adapter.deltas.items() if k in made.deltas}, replaced={}, extra={})


def _fallbacks(types: dict[str, list[str]], asked: tuple[str, str]) -> list[str]:
    """Return which modules have another type than asked, because their rows are no whole blocks."""
    other = Counter(t[0] for t in types.values() if t[0] != asked[0])
    return [f"{n} of {len(types)} modules: A in {kind}, their inputs are no whole blocks of {asked[0]}"
            for kind, n in other.items()]


def _table(adapter: Adapter, made: Adapter, each: bool) -> Table:
    from adaptc.cli.render import Table, spread
    from adaptc.measure import relative_error

    rows: dict[str, list[str]] = {}
    for key in made.deltas:
        module = key.removesuffix(".weight")
        rows.setdefault(module if each else module.rpartition(".")[2], []).append(key)
    types = made.origin.config["types"]
    lines = []
    for name, keys in rows.items():
        errors = [relative_error(adapter.deltas[k], made.deltas[k]) for k in keys if k in adapter.deltas]
        said = sorted({" ".join(types[k]) for k in keys})
        ranks = [[getattr(x.deltas[k], "rank", None) for k in keys if k in x.deltas] for x in (adapter, made)]
        lines.append((name, str(len(keys)), spread(ranks[0]), spread(ranks[1]), ", ".join(said), spread(errors)))
    return Table(("module", ">count", ">rank", ">stored", "types of A and B", ">error"), lines)
