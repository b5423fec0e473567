"""The picture of an adapter's spectra: which ranks carry its energy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptc.cli.reading import Opened
from adaptc.errors import AdaptcError, UsageError
from adaptc.formats.atomic import check, staged
from adaptc.grouping import grouped

if TYPE_CHECKING:
    from adaptc.squeeze.inspection import Module

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(plot: str, force: bool) -> None:
    """Raise UsageError where the plot cannot be drawn, before any work: no matplotlib, another suffix, an old file."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UsageError("--plot needs matplotlib", hint="pip install 'adaptc[plot]'") from e
    if Path(plot).suffix not in _SUFFIXES:
        raise UsageError(f"{plot} is no picture that can be written", hint=f"names end in {', '.join(_SUFFIXES)}")
    check(Path(plot), force=force)


def draw(modules: Sequence[Module], plot: str, force: bool, opened: Opened) -> None:
    """Draw singular values and the energy kept at every rank, one colour a layer type, whole or not at all."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    known = [m for m in modules if m.spectrum and m.energy]
    if not known:
        raise AdaptcError("no module has a spectrum to draw")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    values, kept = figure.subplots(1, 2)
    for at, (name, some) in enumerate(grouped(known).items()):
        colour = f"C{at % 10}"
        for i, m in enumerate(some):
            s = m.spectrum or ()
            ranks = range(1, len(s) + 1)
            label = f"{name} ({len(some)})" if i == 0 and at < 10 else None
            faint = {"color": colour, "alpha": max(0.15, 1 / len(some) ** 0.5), "linewidth": 1.0}
            values.semilogy(ranks, [v / s[0] if v > 0 else None for v in s], **faint)
            kept.plot(ranks, [m.kept(k) / (m.energy or 1.0) for k in ranks], **faint)
            values.plot([], [], color=colour, label=label)
    values.set(xlabel="singular direction", ylabel="singular value / largest", title="Spectrum of every dW")
    kept.set(xlabel="rank kept", ylabel="share of ||dW||\u00b2", title="Energy kept by truncation", ylim=(0, 1.02))
    kept.axhline(0.99, color="0.6", linewidth=0.8, linestyle="--")
    for axes in (values, kept):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values.legend(fontsize="small", frameon=False)
    figure.suptitle(f"{opened.name}, {opened.format.title}, {len(modules)} modules", fontsize="medium")
    with staged(Path(plot), force=force, inputs=opened.inputs) as temp:
        figure.savefig(temp, dpi=130)
