"""adaptc export --onnx: slots in an ONNX model, `.onnx_adapter` files, graphs that decode codes, merged models."""

from __future__ import annotations

from typing import Any

import click

from adaptc.cli.exporting import Request
from adaptc.errors import UsageError

HELP = "An ONNX model with the adapter, or what one with slots loads."
OPTIONS = (
    click.Option(["--slots"], type=click.Choice(["optional", "required"]),
                 help="Give the base inputs for the adapter: with rank-0 defaults, or without any (the browser)."),
    click.Option(["--adapter-only"], is_flag=True, help="Write only the .onnx_adapter of a base that has slots."),
    click.Option(["--expander"], is_flag=True, help="Write a graph that decodes the adapter's codes into the slots."),
    click.Option(["--merge"], type=click.Choice(["load", "disk"]),
                 help="Fold the adapter into the base's float weights: when a session is made, or now."),
    click.Option(["--store"], type=click.Choice(["float32", "float16", "sign", "ternary", "2bit", "nf4"]),
                 help="What the slots hold: floats, or codes that the graph decodes."),
    click.Option(["--bits"], type=float, metavar="X", help="Bits a parameter of --store sign (1 by default)."),
    click.Option(["--target"], type=click.Choice(["ort-cpu", "ort-mobile", "ort-web", "generic"]), default="ort-cpu",
                 show_default=True, help="The runtime whose best variants are chosen."),
    click.Option(["--weights"], type=click.Path(), metavar="DIR",
                 help="Folder of the base's safetensors, to find modules by their values."),
)


def export(request: Request, **options: Any) -> None:
    """Write the artefacts of one mode."""
    raise UsageError("nothing to do: give --slots, --adapter-only, --expander or --merge")
