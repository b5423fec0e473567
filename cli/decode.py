"""adaptc decode: a container back into the plain adapter it stands for."""

from __future__ import annotations

import click

from adaptc.cli.options import example, input_argument, speaking, writing
from adaptc.cli.render import Voice


@click.command("decode", short_help="Write a container as a plain adapter.",
               epilog=example("adaptc decode adapter.b1.adaptc.safetensors --to peft"))
@input_argument("FILE")
@click.option("-o", "--output", type=click.Path(), metavar="OUT", help="Where to write; beside FILE by default.")
@click.option("--to", metavar="ID", help="Dialect to write; that of the original adapter by default.")
@writing
@speaking
def command(file: str, output: str | None, to: str | None, allow_loss: bool, force: bool, voice: Voice) -> None:
    """Decode FILE to ordinary factors and write them for the tools that know no container."""
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.reading import about, open_adapter
    from adaptc.cli.render import Notes
    from adaptc.cli.writing import target
    from adaptc.formats import writer
    from adaptc.formats.portable import without_container

    opened = open_adapter(file)
    adapter = without_container(opened.adapter)
    place = target(opened, output, "decoded", to or writer(adapter, None).id, force)
    with about(file):
        losses = place.losses(adapter, allow_loss)
    nbytes = place.write(adapter)
    data = {"input": opened.name, "output": str(place.out), "losses": list(losses), "notes": list(place.notes),
            "dialect": {"input": opened.format.id, "output": place.format.id},
            "bytes": {"before": opened.nbytes, "after": nbytes}}
    voice.show(data, Notes(place.notes), Notes([f"lost: {loss}" for loss in losses], wrong=True),
               f"wrote {place.shown}: {place.format.title}, {print_nbytes(nbytes)}, was {print_nbytes(opened.nbytes)}")
