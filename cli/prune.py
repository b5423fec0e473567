"""adaptc prune: whole heads and channels out of a model and its adapter, the way back, and channels of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.cli.options import example, reading, speaking
from adaptc.cli.render import Voice
from adaptc.errors import UsageError

if TYPE_CHECKING:
    from adaptc.cli.reading import Opened


@click.command("prune", short_help="Remove heads and channels of a model and its adapter.",
               epilog=example("adaptc prune --base model/ --adapter lora/ --ratio 0.3 --criterion magnitude -o small/"))
@click.option("--base", type=click.Path(), metavar="DIR|GGUF", help="Model folder as transformers writes it.")
@click.option("--adapter", type=click.Path(), metavar="A", help="Adapter that goes with the model.")
@click.option("--ratio", type=float, metavar="R", help="Share of the parameters in heads and channels to remove.")
@click.option("--criterion", type=click.Choice(["loraprune", "wanda", "magnitude", "adapter"]), default="loraprune",
              show_default=True, help="What a unit is worth: docs/pruning.md.")
@click.option("--calibration", type=click.Path(), metavar="S", help="Statistics that adaptc calibrate wrote.")
@click.option("--schedule", type=click.IntRange(min=1), metavar="N",
              help="Remove in N steps of a cubic schedule, calibrating anew on --data before each.")
@click.option("--data", type=click.Path(), metavar="TEXT", help="schedule: text to calibrate on (.txt, .jsonl, .tsv).")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="schedule: tokens for each calibration.")
@click.option("--window", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
              help="schedule: tokens the model reads at once.")
@click.option("--heads-only", is_flag=True, help="Remove heads, keep every channel.")
@click.option("--ffn-only", is_flag=True, help="Remove channels, keep every head.")
@click.option("--unit", type=click.Choice(["auto", "kv", "query"]), default="auto", show_default=True,
              help="A head unit: a key-value head with its queries, or single queries, as many for each.")
@click.option("--multiple", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
              help="Keep a number of channels that N divides.")
@click.option("--squared", is_flag=True, help="loraprune: sum (G M)^2 as in the paper, not |G M| as its code does.")
@click.option("--refit", is_flag=True, help="Fit what stays of down and o to the old outputs by least squares.")
@click.option("--masked", is_flag=True, help="Set to zero in place and keep all shapes.")
@click.option("--keep-first", type=click.IntRange(min=0), default=0, metavar="N", help="masked: first N layers whole.")
@click.option("--keep-last", type=click.IntRange(min=0), default=0, metavar="N", help="masked: last N layers whole.")
@click.option("--recover", type=click.Path(), metavar="PRUNED",
              help="Spread an adapter trained on a pruned model over the whole one again.")
@click.option("--map", "index_map", type=click.Path(), metavar="FILE",
              help="recover: the index map; beside the adapter's folder by default.")
@click.option("--channels", type=float, metavar="R",
              help="Drop this share of an adapter's own rows of B and columns of A; no base.")
@click.option("-o", "--output", type=click.Path(), metavar="OUT", help="Where to write.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--force", is_flag=True, help="Replace an existing output (never an input).")
@reading
@speaking
def command(base: str | None, adapter: str | None, output: str | None, ratio: float | None, channels: float | None,
            recover: str | None, index_map: str | None, alpha: float | None, dialect: str | None, dry_run: bool,
            force: bool, voice: Voice, **options: Any) -> None:
    """Remove heads and FFN channels of a model and its adapter together, by importance.

    OUT is a smaller model folder that transformers loads, with the sliced adapter in OUT/adapter and the index map in
    OUT/pruned_index.safetensors. --recover takes an adapter of that model back to the whole one; --channels prunes an
    adapter alone.
    """
    from adaptc.cli.pruning import prune_channels, prune_model, recover_adapter

    modes = {"--ratio": ratio, "--recover": recover, "--channels": channels}
    given = [k for k, v in modes.items() if v is not None]
    if len(given) != 1:
        raise click.UsageError(f"give one of {', '.join(modes)}, not {' and '.join(given) or 'none'}")
    if output is None and not (dry_run and ratio is not None):
        raise click.UsageError("-o is missing: where to write")
    if recover is not None:
        recover_adapter(recover, index_map, _told(output), voice, force=force, dry_run=dry_run)
        return
    opened = _opened(adapter, alpha, dialect)
    if channels is not None:
        if opened is None:
            raise click.UsageError("--channels wants --adapter")
        prune_channels(opened, channels, _told(output), voice, force=force, dry_run=dry_run)
        return
    if base is None:
        raise click.UsageError("--ratio wants --base, the model to prune")
    prune_model(base, opened, output, voice, ratio=ratio, force=force, dry_run=dry_run, **options)


def _opened(adapter: str | None, alpha: float | None, dialect: str | None) -> Opened | None:
    from adaptc.cli.reading import open_adapter

    return None if adapter is None else open_adapter(adapter, alpha, dialect)


def _told(output: str | None) -> Path:
    if output is None:
        raise UsageError("-o is missing: where to write")
    return Path(output)
