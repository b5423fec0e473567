"""adaptc inspect: what an adapter file holds, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import example, input_argument, reading, speaking
from adaptc.cli.render import Block, Facts, Notes, Table, Voice, count, listed, number, spread

if TYPE_CHECKING:
    from adaptc.cli.reading import Opened
    from adaptc.squeeze.inspection import Module

# What PEFT configs say about all modules at once, worth repeating as it is.
_CONFIG = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern",
           "alpha_pattern", "target_parameters", "modules_to_save")


@click.command("inspect", short_help="Show what an adapter holds and what is wrong with it.",
               epilog=example("adaptc inspect adapter/"))
@input_argument()
@click.option("--plot", type=click.Path(), metavar="FILE.png", help="Draw the spectra (needs matplotlib).")
@click.option("--force", is_flag=True, help="Replace an existing plot.")
@click.option("--intruders", is_flag=True, help="Show instead which dimensions of W0 + dW resemble none of the base's.")
@click.option("--base", type=click.Path(), metavar="DIR", help="--intruders: the base model's folder or safetensors.")
@click.option("--after", metavar="SPEC", help="--intruders: and after these passes, as shrink or truncate{rank=8}.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="--intruders: leading singular vectors to look at.")
@click.option("--cosine", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="X",
              help="--intruders: resemblance below which a vector is one.")
@click.option("--cache", type=click.Path(), metavar="DIR", help="--intruders: where spectra of the base are kept.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@reading
@speaking
def command(source: str, plot: str | None, force: bool, intruders: bool, base: str | None, after: str | None, top: int,
            cosine: float, cache: str | None, jobs: int, alpha: float | None, dialect: str | None,
            voice: Voice) -> None:
    """Show the dialect of IN and why, its modules with rank, scale and spectrum, and what looks wrong.

    The effective rank is exp of the entropy of the energies s_i^2 / sum s^2; "90%" and "99%" are the ranks that keep
    this share of the energy. alpha is scale x rank, what a plain LoRA config would say.
    """
    from adaptc.cli.reading import about, open_adapter
    from adaptc.passes import Context
    from adaptc.squeeze.inspection import inspect

    if plot is not None:
        from adaptc.cli.plot import check_plot

        check_plot(plot, force)
    opened = open_adapter(source, alpha, dialect)
    if intruders:
        from adaptc.cli.intruders import show_intruders

        show_intruders(voice, opened, base, after, cache, top, cosine, jobs)
        return
    with voice.progress() as progress, about(source):
        modules = inspect(opened.adapter, ctx=Context(jobs=jobs, progress=progress))
    if plot is not None:
        from adaptc.cli.plot import draw

        draw(modules, plot, force, opened)
    last = [f"wrote {plot}"] if plot is not None else []
    voice.show(_data(opened, modules), *_blocks(opened, modules, voice), *last)


def ladder(modules: Sequence[Module]) -> list[int]:
    """Return the ranks 1, 2, 4, ... below the largest stored one, and that one."""
    most = max((len(m.spectrum or ()) for m in modules), default=0)
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most] if most else []


def _blocks(opened: Opened, modules: Sequence[Module], voice: Voice) -> list[Block]:
    from adaptc.squeeze.inspection import energy_kept

    adapter, origin = opened.adapter, opened.adapter.origin
    said = ", ".join(_said(k, v) for k in _CONFIG if (v := origin.config.get(k)) not in (None, False, {}, [])
                     and (k, v) != ("init_lora_weights", True))
    files = ", ".join(f"{name} {print_nbytes(n)}" for name, n in opened.files.items())
    carried = {**adapter.replaced, **adapter.extra}
    held = print_nbytes(sum(t.nbytes for t in carried.values()))
    facts = Facts([
        ("dialect", f"{opened.format.title} ({opened.evidence.reason})"), ("base", origin.base_model), ("files", files),
        ("config", said), ("modules", str(len(modules))),
        ("carried", f"{count(carried, 'tensor')}, {held} ({listed(list(carried))})" if carried else None),
        *(("history", _step(s)) for s in adapter.history),
    ])
    ranks = ladder(modules)
    energies = Table(["rank of every module", *(f">{k}" for k in ranks)],
                     [["energy kept", *(_percent(energy_kept(modules, k)) for k in ranks)]] if len(ranks) > 1 else [])
    return [facts, _table(modules, voice.verbose), energies, Notes(_flags(modules, voice.verbose), wrong=True),
            Notes(list(origin.notes))]


def _said(option: str, value: Any) -> str:
    """Return a config entry in short: a switch by its name, a list by its items, a map by its size."""
    if value is True:
        return option
    if isinstance(value, Mapping):
        return f"{option} of {len(value)}"
    return f"{option} {'+'.join(map(str, value)) if isinstance(value, list) else value}"


def _table(modules: Sequence[Module], each: bool) -> Table:
    from adaptc.grouping import grouped

    rows = []
    for name, some in grouped(modules, each).items():
        shapes, dtypes, kinds = (list(dict.fromkeys(v)) for v in zip(
            *(("x".join(str(d or "?") for d in m.shape), m.dtype, m.kind) for m in some), strict=True))
        rows.append((name, str(len(some)), listed(kinds, 2), listed(shapes, 2), spread([m.rank for m in some]),
                     spread([m.scale for m in some]), spread([_alpha(m) for m in some]), _dtypes(dtypes),
                     print_nbytes(sum(m.nbytes for m in some)), spread([m.effective_rank for m in some]),
                     spread([m.rank_for(0.9) for m in some]), spread([m.rank_for(0.99) for m in some])))
    return Table(("module", ">count", "kind", "shape", ">rank", ">scale", ">alpha", "dtype", ">bytes", ">effective",
                  ">90%", ">99%"), rows, spare=("kind", "dtype", "alpha", "shape", "90%"))


def _dtypes(dtypes: Sequence[str]) -> str:
    """Return dtypes by the names that --dtype takes."""
    text = listed(dtypes, 2)
    for long, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp64")):
        text = text.replace(long, short)
    return text


def _alpha(module: Module) -> float | None:
    return None if module.scale is None or module.rank is None else module.scale * module.rank


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%" if share < 0.9995 or share == 1 else f"{100 * share:.6g}%"


def _step(step: Any) -> str:
    error = f", error {number(step.error)}" if step.error is not None else ""
    before, after = print_nbytes(step.nbytes_before), print_nbytes(step.nbytes_after)
    return f"{step.spec} ({step.version}): {before} to {after}{error}"


def _flags(modules: Sequence[Module], each: bool) -> list[str]:
    about: dict[str, list[str]] = {}
    for m in modules:
        for flag in m.flags:
            about.setdefault(flag, []).append(m.key)
    return [f"{len(keys)} of {count(modules, 'module')}: {flag} ({listed(keys, len(keys) if each else 2)})"
            for flag, keys in about.items()]


def _data(opened: Opened, modules: Sequence[Module]) -> dict[str, Any]:
    from adaptc.squeeze.inspection import energy_kept

    adapter, origin = opened.adapter, opened.adapter.origin
    return {
        "input": opened.name, "dialect": opened.format.id, "evidence": opened.evidence.reason,
        "base": origin.base_model, "files": opened.files, "config": dict(origin.config), "notes": list(origin.notes),
        "modules": [{
            "name": m.key, "kind": m.kind, "shape": list(m.shape), "rank": m.rank, "scale": m.scale, "alpha": _alpha(m),
            "dtype": m.dtype, "bytes": m.nbytes, "effective_rank": m.effective_rank, "energy": m.energy,
            "spectrum": None if m.spectrum is None else list(m.spectrum), "flags": list(m.flags),
        } for m in modules],
        "energy_kept": {str(k): energy_kept(modules, k) for k in ladder(modules)},
        "carried": {k: {"bytes": t.nbytes} for k, t in {**adapter.replaced, **adapter.extra}.items()},
        "history": [{"spec": s.spec, "version": s.version, "error": s.error,
                     "bytes": {"before": s.nbytes_before, "after": s.nbytes_after}} for s in adapter.history],
    }
