"""adaptc compare: how adapters relate before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.cli.merge import short_names
from adaptc.cli.options import example, reading, speaking
from adaptc.cli.plot import check_plot
from adaptc.cli.reading import open_adapter
from adaptc.cli.render import Notes, Table, Voice, number
from adaptc.errors import UsageError
from adaptc.formats.atomic import staged
from adaptc.grouping import grouped

if TYPE_CHECKING:
    from adaptc.squeeze.compare import Comparison, Module, Pair


@click.command("compare", epilog=example("adaptc compare style/ subject/ --plot related.png"))
@click.argument("sources", metavar="IN...", nargs=-1, required=True)
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw cosines as heat maps: png, svg or pdf.")
@click.option("--force", is_flag=True, help="Replace an existing plot.")
@click.option("--any-base", is_flag=True, help="Compare even if the inputs name different base models.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@reading
@speaking
def command(sources: tuple[str, ...], plot: str | None, force: bool, any_base: bool, jobs: int, alpha: float | None,
            dialect: str | None, voice: Voice) -> None:
    """Show how two adapters or more relate, per module and in total, without the base model.

    cosine: of the deltas as vectors. conflict: share of entries with opposite signs, 0.5 when unrelated. shared: mean
    squared cosine of the principal angles between output (input) spaces; near rank/size when unrelated, 1 when equal.
    For sparse adapters, common: share of the smaller one's entries that both change; AWOM ||S1^T S2||, 0 where no row
    is shared; AWOR: share of zeros in S1^T S2, 1 there.
    """
    from adaptc.passes import Context
    from adaptc.squeeze.compare import compare

    if len(sources) < 2:
        raise UsageError(f"compare takes two adapters or more, got {len(sources)}")
    if plot is not None:
        check_plot(plot, force)
    adapters = [open_adapter(s, alpha, dialect).adapter for s in sources]
    with voice.progress() as progress:
        found = compare(adapters, short_names(sources), Context(jobs=jobs, progress=progress), any_base)
    if plot is not None:
        draw(found, plot, force)
    last = [f"wrote {plot}"] if plot is not None else []
    voice.show(_data(found), *_blocks(found, voice.verbose), Notes(found.notes), *last)


def _data(found: Comparison) -> dict[str, Any]:
    def pairs(some: Any) -> list[dict[str, Any]]:
        return [{"pair": [found.names[i], found.names[j]], "cosine": p.cosine, "conflict": p.conflict,
                 "shared_output": p.shared_output, "shared_input": p.shared_input, "output_cosines": list(p.output),
                 "input_cosines": list(p.input), "common": p.common, "awom": p.awom, "awor": p.awor}
                for (i, j), p in some.items()]

    total = [{k: v for k, v in p.items() if not k.endswith("_cosines")} for p in pairs(found.totals)]
    modules = [{"name": m.key, "norms": list(m.norms), "ranks": list(m.ranks), "pairs": pairs(m.pairs)}
               for m in found.modules]
    return {"adapters": list(found.names), "total": total, "notes": list(found.notes), "modules": modules}


def _blocks(found: Comparison, each: bool) -> list[Table]:
    """Return a table a pair: totals of all pairs first, then modules by kind."""
    sparse = any(p.awom is not None for p in found.totals.values())
    columns = (">cosine", ">conflict", ">shared out", ">shared in", *((">common", ">AWOM", ">AWOR") if sparse else ()))
    blocks = [Table(("adapters", *columns), [
        (f"{found.names[i]} ~ {found.names[j]}", *_cells([p], sparse)) for (i, j), p in found.totals.items()])]
    if len(found.totals) > 1 and not each:
        return blocks
    for i, j in found.totals:
        lines = []
        for name, some in grouped(found.modules, each).items():
            having = [m for m in some if (i, j) in m.pairs]
            ratio = [m.norms[j] / m.norms[i] for m in having if m.norms[i]]
            cells = _cells([m.pairs[i, j] for m in having], sparse)
            lines.append((name, str(len(having)), *cells, number(sum(ratio) / len(ratio)) if ratio else "-"))
        title = f"{found.names[i]} ~ {found.names[j]}" if len(found.totals) > 1 else "module"
        blocks.append(Table((title, ">count", *columns, ">norm ratio"), lines))
    return blocks


def _cells(pairs: Sequence[Pair], sparse: bool) -> tuple[str, ...]:
    """Return the means of each measure over the pairs that have it."""
    names = ("cosine", "conflict", "shared_output", "shared_input", *(("common", "awom", "awor") if sparse else ()))
    known = ([v for p in pairs if (v := getattr(p, name)) is not None and v == v] for name in names)
    return tuple(f"{sum(values) / len(values):.3f}" if values else "-" for values in known)


def draw(found: Comparison, plot: str, force: bool) -> None:
    """Draw two heat maps of cosines, adapter by adapter and module by pair, whole or not at all."""
    from matplotlib.figure import Figure

    count, pairs = len(found.names), list(found.totals)
    square = [[1.0] * count for _ in range(count)]
    for (i, j), p in found.totals.items():
        square[i][j] = square[j][i] = p.cosine
    lines = [[m.pairs[p].cosine if p in m.pairs else float("nan") for p in pairs] for m in found.modules]
    figure = Figure(figsize=(4 + 0.5 * count + 0.4 * len(pairs), max(3.5, min(0.14 * len(lines) + 1.5, 60))))
    left, right = figure.subplots(1, 2, width_ratios=(count, max(len(pairs), 2)))
    found_ones = [abs(p.cosine) for m in found.modules for p in m.pairs.values()]
    limit = max([0.1, *found_ones])  # unrelated adapters would all be white on a scale of -1 to 1
    left.imshow(square, vmin=-limit, vmax=limit, cmap="RdBu_r")
    left.set_xticks(range(count), found.names, rotation=60, ha="right", fontsize=7)
    left.set_yticks(range(count), found.names, fontsize=7)
    for i in range(count):
        for j in range(count):
            left.text(j, i, f"{square[i][j]:.2f}", ha="center", va="center", fontsize=7)
    left.set_title("cosine of dW, all modules", fontsize=8)
    image = right.imshow(lines, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    right.set_xticks(range(len(pairs)), [f"{i + 1} ~ {j + 1}" for i, j in pairs], fontsize=7)
    right.set_yticks(range(len(lines)), [_short(m) for m in found.modules], fontsize=4)
    right.set_title("by module", fontsize=8)
    figure.colorbar(image, ax=right, fraction=0.1)
    figure.tight_layout()
    with staged(Path(plot), force=force) as temp:
        figure.savefig(temp, dpi=150)


def _short(module: Module) -> str:
    return module.key.removesuffix(".weight")
