"""The training notes of kohya and LyCORIS files: verbatim, and up to date where adaptc changed a file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from adaptc.adapter import Adapter
from adaptc.formats.format import history_metadata

NAMES_KEY = "adaptc.names"
HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of the tensors' bytes
_OTHERS = ("lora_adapter_metadata",)  # what another dialect says of ranks and scales


def updated_metadata(adapter: Adapter, network: str, flat: Collection[str],
                     ranks: Mapping[str, tuple[int, float, bool]], names: Mapping[str, str]) -> dict[str, str]:
    """Return the safetensors metadata. `ranks`: stem -> (rank, scale, whether it is a convolution with a kernel).

    An untouched file of a dialect in `flat` keeps its metadata as it is. Otherwise stale hashes go, ss_network_module
    names the loader, ss_network_dim and ss_network_alpha the rank and alpha of linear layers ("Dynamic" where they
    differ, as sd-scripts says it), conv_dim and conv_alpha in ss_network_args those of convolutions.
    """
    own = history_metadata(adapter) | ({NAMES_KEY: json.dumps(names, separators=(",", ":"))} if names else {})
    metadata = dict(adapter.origin.metadata)
    mine = adapter.origin.dialect in flat
    if mine and not adapter.history and _loader(metadata, network) == metadata.get("ss_network_module", network):
        return metadata | own
    metadata = {k: v for k, v in metadata.items() if k not in HASHES + _OTHERS}
    if adapter.origin.base_model and not mine:
        metadata.setdefault("ss_sd_model_name", adapter.origin.base_model)
    metadata["ss_network_module"] = _loader(metadata, network)
    linear = [(r, s) for r, s, conv in ranks.values() if not conv] or [(r, s) for r, s, _ in ranks.values()]
    metadata |= _said(linear, metadata, "ss_network_dim", "ss_network_alpha")
    metadata |= _convolutions([(r, s) for r, s, conv in ranks.values() if conv], metadata)
    return metadata | own


def _loader(metadata: Mapping[str, str], network: str) -> str:
    """Return the module that loads the file: the recorded one if it is of the same family, else `network`."""
    said = metadata.get("ss_network_module", "")
    return said if said.split(".")[0] == network.split(".")[0] else network


def _said(modules: list[tuple[int, float]], old: Mapping[str, str], dim: str, alpha: str) -> dict[str, str]:
    """Return what `dim` and `alpha` should say of these (rank, scale) pairs, old wording kept where it is right."""
    if not modules:
        return {}
    ranks, alphas = {r for r, _ in modules}, {r * s for r, s in modules}
    return {key: _worded(old.get(key), values) for key, values in ((dim, ranks), (alpha, alphas))}


def _worded(old: str | None, values: set[int] | set[float]) -> str:
    if len(values) > 1:
        return "Dynamic"
    value = next(iter(values))
    try:
        if old is not None and abs(float(old) - value) <= 1e-9 * abs(value):
            return old
    except ValueError:
        pass
    return str(value)


def _convolutions(modules: list[tuple[int, float]], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return ss_network_args with its conv_dim (or conv_rank) and conv_alpha brought up to date, if it has them."""
    try:
        args = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    dim = next((k for k in ("conv_dim", "conv_rank") if isinstance(args, dict) and k in args), None)
    if dim is None or not modules:
        return {}
    text = {k: str(v) for k, v in args.items()}
    said = _said(modules, text, dim, "conv_alpha")
    new = args | {k: v for k, v in said.items() if k in args and v != text[k]}
    return {"ss_network_args": json.dumps(new)} if new != args else {}
