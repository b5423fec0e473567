"""adaptc verify: whether a container is whole, and whether a base is the one it was made for."""

from __future__ import annotations

import click

from adaptc.cli.options import example, input_argument, speaking
from adaptc.cli.render import Voice


@click.command("verify", short_help="Check a container: structure, checksums, values, base.",
               epilog=example("adaptc verify adapter.b1.adaptc.safetensors"))
@input_argument("FILE")
@click.option("--base", type=click.Path(), metavar="DIR", help="Base model that must be the one it was made for.")
@speaking
def command(file: str, base: str | None, voice: Voice) -> None:
    """Check FILE whole: manifest, every checksum, finite values of every decoded factor, and the base's fingerprint."""
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
