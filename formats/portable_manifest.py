"""The container's manifest: JSON in the metadata, and the checksums in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adaptc.adapter import Step
from adaptc.errors import FormatError
from adaptc.formats.portable_write import VERSION, digest
from adaptc.tensorfile import TensorFile, check_name, unique

MANIFEST = "adaptc"
# Checksums of tensors up to this size are checked whenever a file is opened; `adaptc verify` checks them all.
CHECKED_AT_OPEN = 2**20
_FIELDS: Mapping[str, type] = {"format": int, "base": str, "fingerprint": str, "codes": list, "groups": list,
                               "replaced": dict, "extra": dict, "history": list, "sums": dict}


def manifest_of(file: TensorFile) -> dict[str, Any]:
    """Return the manifest. Raises FormatError unless it is a JSON object of a version this code reads."""
    try:
        manifest = json.loads(file.metadata[MANIFEST], object_pairs_hook=unique)
    except KeyError as e:
        raise FormatError("metadata holds no adaptc manifest") from e
    except (ValueError, RecursionError) as e:
        raise FormatError("manifest is not JSON") from e
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError("manifest has no format version")
    if version > VERSION:
        raise FormatError(f"container format {version} is newer than {VERSION}, the newest read here",
                          hint="upgrade adaptc")
    for name, value in manifest.items():
        if name not in _FIELDS:
            raise FormatError(f"manifest has a field {name[:60]!r}, which this version does not know")
        if not isinstance(value, _FIELDS[name]):
            raise FormatError(f"manifest is malformed, {name} is no {_FIELDS[name].__name__}")
    if "sums" not in manifest:
        raise FormatError("manifest has no checksums")
    return dict(manifest)


def check_sums(file: TensorFile, manifest: Mapping[str, Any], limit: int | None) -> int:
    """Check tensors of up to `limit` bytes (None: all) against their checksums; return how many were checked.

    A payload that the file holds only in part has no checksum that fits and is skipped.
    """
    sums = manifest["sums"]
    if sums.keys() != file.keys():
        odd = min(sums.keys() ^ file.keys())
        raise FormatError(f"manifest and file disagree about tensor {odd!r}")
    checked = 0
    for name in file:
        if name == file.cut or (limit is not None and file.nbytes(name) > limit):
            continue
        if digest(file[name]) != sums[name]:
            raise FormatError(f"tensor {name!r} does not match its checksum, the file is damaged")
        checked += 1
    return checked


def read_history(steps: list[Any]) -> tuple[Step, ...]:
    """Return what was done to the adapter. Raises FormatError for a step that is none."""
    out = []
    for s in steps:
        step = Step(**s) if isinstance(s, dict) and s.keys() == {*Step.__slots__} else None
        if step is None or not (isinstance(step.spec, str) and isinstance(step.version, str)
                                and type(step.nbytes_before) is int and type(step.nbytes_after) is int
                                and type(step.error) in (float, int, type(None))):
            raise FormatError(f"history has the step {str(s)[:60]}")
        out.append(step)
    return tuple(out)


def checked_names(names: list[str]) -> list[str]:
    """Return `names`. Raises FormatError for one that no tensor could have."""
    for name in names:
        if not name or len(name) > 1000 or not name.isprintable():  # rarely: the whole check takes its time
            check_name(name, "manifest")
    return names
