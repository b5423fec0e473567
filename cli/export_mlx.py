"""adaptc export --mlx: adapters.safetensors and adapter_config.json, the folder that mlx-lm takes as adapter_path."""

from __future__ import annotations

from adaptc.cli.export_gguf import ALLOW_LOSS
from adaptc.cli.exporting import Request

HELP = "The folder mlx-lm takes as its adapter_path."
OPTIONS = (ALLOW_LOSS,)


def export(request: Request, *, allow_loss: bool) -> None:
    """Write the folder; deltas that need the base become plain ones where it is given and MLX cannot say them."""
    from adaptc.bytesize import print_nbytes
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.cli.render import Notes
    from adaptc.cli.writing import target
    from adaptc.errors import UsageError
    from adaptc.passes import Context
    from adaptc.squeeze.resolve import Resolve

    opened = open_adapter(request.source, request.alpha, request.dialect)
    place = target(opened, request.output, "mlx", "mlx", request.force)
    if not place.folder:
        raise UsageError(f"mlx-lm takes a folder, {place.out} would be one file", hint="give -o a name without suffix")
    adapter, weights = opened.adapter, open_base(request.base)
    with about(request.source):
        if weights is not None and place.format.cannot(place.format.storable(adapter)):
            adapter = Resolve()(adapter, Context(weights)).adapter
        losses = place.losses(adapter, allow_loss)
    nbytes = place.write(adapter)
    use = f"mlx_lm.generate --model {adapter.origin.base_model or 'MODEL'} --adapter-path {place.out}"
    data = {"input": opened.name, "output": str(place.out), "losses": list(losses), "notes": [*place.notes, use],
            "bytes": {"before": opened.nbytes, "after": nbytes}}
    request.voice.show(data, Notes([*place.notes, use]), Notes([f"lost: {x}" for x in losses], wrong=True),
                       f"wrote {place.shown}: MLX, {print_nbytes(nbytes)}, was {print_nbytes(opened.nbytes)}")
