"""adaptc convert: the same adapter in another dialect, or the list of what that dialect cannot say."""

from __future__ import annotations

import click

from adaptc.bytesize import read_nbytes
from adaptc.cli.options import example, input_argument, reading, speaking, writing
from adaptc.cli.render import Voice


@click.command("convert", short_help="Write an adapter in another dialect.",
               epilog=example("adaptc convert adapter/ adapter.safetensors --to peft"))
@input_argument()
@click.argument("output", metavar="OUT", type=click.Path())
@click.option("--to", metavar="ID", help="Dialect to write: peft, kohya, diffusers, mlx, adaptc, ...")
@click.option("--prefix", metavar="BYTES", callback=lambda ctx, param, value: value and read_nbytes(value),
              help="Cut a container to this size without decoding it: its most important part.")
@click.option("--base", type=click.Path(), metavar="DIR",
              help="Base model, for deltas that only mean something on its weights.")
@reading
@writing
@speaking
def command(source: str, output: str, to: str | None, prefix: int | None, base: str | None, alpha: float | None,
            dialect: str | None, allow_loss: bool, force: bool, voice: Voice) -> None:
    """Write IN to OUT in another dialect, every delta unchanged.

    What the dialect cannot say is listed, and refused without --allow-loss. With --base, deltas that depend on the base
    weights become plain ones where the dialect cannot hold them as they are.
    """
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.cli.render import Notes, count, listed
    from adaptc.cli.writing import target
    from adaptc.fingerprint import stamped
    from adaptc.formats.prefix import cut
    from adaptc.passes import Context
    from adaptc.squeeze.resolve import Resolve

    if to is None and prefix is None:
        raise click.UsageError("nothing to do: give --to, or --prefix for a container")
    opened = open_adapter(source, alpha, dialect)
    place = target(opened, output, "", to, force)
    adapter, notes = opened.adapter, list(place.notes)
    with about(source):
        if prefix is not None:
            adapter = cut(adapter, prefix, place.size_of)
        if place.format.id == "adaptc":
            adapter = stamped(adapter, open_base(base))
        weights = open_base(base)
        if weights is not None and place.format.cannot(adapter):
            outcome = Resolve()(adapter, Context(weights))
            done = [r.key for r in outcome.rows if r.note == Resolve.done]
            adapter = outcome.adapter if done else adapter
            notes += [f"{count(done, 'delta')} resolved on the base weights ({listed(done, 2)})"] if done else []
        losses = place.losses(adapter, allow_loss)
    nbytes = place.write(adapter)
    data = {"input": opened.name, "output": str(place.out), "losses": list(losses), "notes": notes,
            "dialect": {"input": opened.format.id, "output": place.format.id},
            "bytes": {"before": opened.nbytes, "after": nbytes}}
    voice.show(data, Notes(notes), Notes([f"lost: {loss}" for loss in losses], wrong=True),
               f"wrote {place.shown}: {place.format.title}, {print_nbytes(nbytes)}, "
               f"was {opened.format.title}, {print_nbytes(opened.nbytes)}")
